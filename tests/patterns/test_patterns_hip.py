"""HiP's search against its definition, chunk by chunk."""

import itertools

import hip_cases
import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import decode_attention, patterns, stripe_attention


def by_loops(queries, keys, *others):
    """Chunks that are kept; queries and keys [.., D] in fp64."""
    return hip_cases.search(lambda j: float((queries @ keys[j]).max()), *others)


def definition(q, k, keys, granule, local, first, sample, block_q, size):
    """Bool [B, Hq, Lq, Lkv]."""
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    seen = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            own = k[b, :, h * k.shape[2] // heads].double()
            for start in range(0, q_len, block_q):
                stop, at = min(start + block_q, q_len), start + kv_len - q_len
                begin = max(0, at - local) // size * size
                low = min(first, begin)
                queries = q[b, start:stop:sample, h].double()
                found = by_loops(queries, own, low, begin, keys // granule, granule)
                taken = [*range(low), *(j for a, c in found for j in range(a, c))]
                for i in range(start, stop):
                    seen[b, h, i, [*taken, *range(begin, at + i - start + 1)]] = True
    return seen


@pytest.mark.parametrize(
    ("q_len", "kv_len", "keys", "granule", "local", "first", "sample", "block_q"),
    [
        (400, 400, 32, 2, 64, 4, 2, 64),
        (200, 333, 40, 8, 0, 0, 1, 64),
        (300, 300, 21, 3, 30, 10, 5, 128),
        (130, 500, 6, 1, 64, 1, 64, 64),
        (300, 300, 512, 2, 0, 4, 2, 64),
        (40, 40, 16, 2, 128, 4, 2, 64),
    ],
)
def test_the_definition(randn, q_len, kv_len, keys, granule, local, first, sample, block_q):
    q, k = randn(2, q_len, 4, 16), randn(2, kv_len, 2, 16, seed=1)
    options = {"keys": keys, "granule": granule, "local": local, "first": first, "sample": sample}
    mask = patterns.hip(q, k, **options, block_q=block_q)
    mask.validate()
    assert mask.to_dense().equal(definition(q, k, *options.values(), block_q, 64))


def test_from_q_k_v_to_the_output(randn, agrees):
    q, k, v = (randn(1, 300, heads, 32, seed=s) for s, heads in enumerate((4, 2, 2)))
    mask = patterns.hip(q, k, keys=32, local=0)
    visible = definition(q, k, 32, 2, 0, 4, 2, 64, 64)
    agrees(*stripe_attention(q, k, v, mask, return_lse=True), q, k, v, visible)


def test_q_and_k_of_different_dtypes(randn):
    q, k = randn(1, 200, 2, 16).bfloat16(), randn(1, 200, 1, 16, seed=1)
    found = patterns.hip(q, k, keys=16, local=0)
    assert found.columns.equal(patterns.hip(q.float(), k, keys=16, local=0).columns)


@pytest.mark.parametrize("dim", [12, 264])
def test_head_dims_that_attention_does_not_take(randn, dim):
    q = randn(1, 200, 1, dim)
    message = f"head dim of q must be a multiple of 8 from 8 to 256, got {dim}"
    with pytest.raises(RuntimeError, match=message):
        patterns.hip(q, q, keys=16)
    with pytest.raises(RuntimeError, match=message):
        patterns.HipSearch(1, 1).step(q[:, :1], q, torch.tensor([200]))


def test_without_the_host(randn):
    q, k = randn(1, 2048, 2, 16), randn(1, 2048, 1, 16)
    with Watch() as watch:
        mask = patterns.hip(q, k, keys=64)
    mask.validate()
    assert watch.largest <= 1 << 20
    on_meta = patterns.hip(q.to("meta"), k.to("meta"), keys=64)
    assert on_meta.columns.shape == mask.columns.shape
    assert patterns.hip(q[:0], k[:0]).counts.shape == (0, 2, 32)
    assert patterns.hip(q[:, :0], k).counts.shape == (1, 2, 0)


def cache_of(pages, page, lengths, heads=2, dim=8, per_head=False):
    """Caches with NaN where nothing is written, their page table, and the keys of each request."""
    generator = torch.Generator().manual_seed(7)
    batch, width = len(lengths), pages
    tables = (batch, heads) if per_head else (batch,)
    count = batch * (heads if per_head else 1) * width
    k, v = torch.full((2, count + 3, page, heads, dim), torch.nan)
    table = torch.randperm(count + 3, generator=generator)[:count].view(*tables, width).int()
    keys = [torch.randn(n, heads, dim, generator=generator) for n in lengths]
    for b, h in itertools.product(range(batch), range(heads)):
        own = table[b, h] if per_head else table[b]
        for j, key in enumerate(keys[b][:, h]):
            k[own[j // page], j % page, h] = key
            v[own[j // page], j % page, h] = key.flip(0)
    return k, v, table, keys


class Steps:
    """What `HipSearch` should list, by loops: {(request, head): keys}."""

    def __init__(self, keys, granule, local, first, refresh):
        self.keys, self.granule, self.local, self.first = keys, granule, local, first
        self.refresh, self.steps, self.found = refresh, 0, {}

    def listed(self, q, caches):
        wanted = {}
        for b, h in itertools.product(range(len(caches)), range(2)):
            own, length = caches[b][:, h].double(), len(caches[b])
            if self.steps % self.refresh == 0:
                begin = max(0, length - self.local)
                low = min(self.first, begin)
                queries = q[b, 0].unflatten(0, (2, -1))[h].double()
                n = self.keys // self.granule
                chunks = by_loops(queries, own, low, begin, n, self.granule)
                self.found[b, h] = (
                    begin,
                    [*range(low), *(j for a, c in chunks for j in range(a, c))],
                )
            begin, before = self.found[b, h]
            wanted[b, h] = [*before, *range(begin, length)]
        self.steps += 1
        return wanted


@pytest.mark.parametrize("paged", ["contiguous", "pages", "pages of heads"])
@pytest.mark.parametrize(
    ("keys", "granule", "local", "first", "refresh"),
    [(32, 2, 16, 4, 1), (24, 8, 5, 0, 3), (10, 1, 1, 2, 4), (512, 2, 128, 4, 2), (9, 3, 40, 50, 2)],
)
def test_decoding(keys, granule, local, first, refresh, paged):
    lengths, page, pages = [230, 1, 57, 0, 100], 16, 16
    k, v, table, caches = cache_of(pages, page, lengths, per_head=paged == "pages of heads")
    if paged == "contiguous":
        k, v = (x[table.long()].flatten(1, 2) for x in (k, v))
    given = None if paged == "contiguous" else table
    options = {"keys": keys, "granule": granule, "local": local, "first": first}
    found = patterns.HipSearch(len(lengths), 2, refresh=refresh, **options)
    steps = Steps(*options.values(), refresh)
    generator = torch.Generator().manual_seed(3)
    for step in range(2 * refresh + 1):
        q = torch.randn(len(lengths), 1, 6, 8, generator=generator)
        seq_lens = torch.tensor([len(own) for own in caches], dtype=torch.int32)
        with Watch():
            tokens, counts = found.step(q, k, seq_lens, given)
        assert counts is None
        wanted = steps.listed(q, caches)
        listed = torch.full((len(lengths), 1, 2, 256), -1, dtype=torch.int32)
        for (b, h), own in wanted.items():
            taken = tokens[b, 0, h]
            assert taken[taken >= 0].tolist() == own, (step, b, h)
            listed[b, 0, h, : len(own)] = torch.tensor(own)
        options_ = {"page_table": given}
        out = decode_attention(q, k, v, seq_lens, tokens=(tokens, None), **options_)
        exact = decode_attention(q, k, v, seq_lens, tokens=(listed, None), **options_)
        torch.testing.assert_close(out, exact)
        if keys == 512:
            torch.testing.assert_close(out, decode_attention(q, k, v, seq_lens, **options_))
        for b, own in enumerate(caches):
            if len(own):
                key = torch.randn(2, 8, generator=generator)
                caches[b] = torch.cat([own, key[None]])
                for h in range(2):
                    at = len(own)
                    row = {"contiguous": (b, at)}.get(paged)
                    if row is None:
                        one = table[b, h] if paged == "pages of heads" else table[b]
                        row = int(one[at // page]), at % page
                    k[row][h], v[row][h] = key[h], key[h].flip(0)


def test_a_restart_searches_again(randn):
    k = randn(1, 300, 1, 8)
    found = patterns.HipSearch(1, 1, keys=8, local=8, first=0, refresh=5)
    lens = torch.tensor([200])
    queries = [randn(1, 1, 2, 8, seed=s) for s in range(9)]
    first, _ = found.step(queries[0], k, lens)
    for q in queries[1:5]:
        assert found.step(q, k, lens)[0].equal(first)
    assert not found.step(queries[5], k, lens)[0].equal(first)
    found.restart()
    again, _ = found.step(queries[0], k, lens)
    assert again.equal(first)


def test_pages_that_a_table_lacks_are_not_found(randn):
    k, q = randn(20, 16, 1, 8), randn(1, 1, 2, 8)
    table = torch.arange(20)[None]
    table[0, 3], table[0, 5] = -1, 20
    found = patterns.HipSearch(1, 1, keys=256, local=16, first=0)
    tokens, _ = found.step(q, k, torch.tensor([320]), table)
    missing = [*range(49, 63), *range(81, 95)]  # a chunk over an edge may have one more
    assert not set(tokens.flatten().tolist()) & set(missing)


Q = torch.zeros(1, 9, 2, 16)
NEW, CACHE, LENS = torch.zeros(2, 1, 4, 16), torch.zeros(2, 64, 2, 16), torch.tensor([9, 3])
TABLE = torch.zeros(2, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: patterns.HipSearch(2, 2, keys=33),
            ValueError,
            "keys must be a multiple of granule = 2, got 33",
        ),
        (lambda: patterns.HipSearch(2, 0), ValueError, "heads_kv must be at least 1, got 0"),
        (lambda: patterns.HipSearch(2.0, 1), TypeError, r"batch must be an int, got 2\.0"),
        (
            lambda: patterns.HipSearch(2, 2, local=0),
            ValueError,
            "local must be at least 1, got 0",
        ),
        (
            lambda: patterns.HipSearch(2, 2, refresh=0),
            ValueError,
            "refresh must be at least 1, got 0",
        ),
        (
            lambda: patterns.HipSearch(2, 3).step(NEW, CACHE, LENS),
            ValueError,
            r"q must have shape \[2, 1, a multiple of 3, head dim\], got \[2, 1, 4, 16\]",
        ),
        (
            lambda: patterns.HipSearch(2, 4).step(NEW, CACHE, LENS),
            ValueError,
            r"k_cache must have 4 KV heads and q's head dim, 16, got shape \[2, 64, 2, 16\]",
        ),
        (
            lambda: patterns.HipSearch(2, 2).step(NEW, CACHE.double(), LENS),
            TypeError,
            r"k_cache must have q's dtype, torch\.float32, got torch\.float64",
        ),
        (
            lambda: patterns.HipSearch(2, 2).step(NEW, CACHE[:1], LENS),
            ValueError,
            "k_cache must have 2 requests without a page_table, got 1",
        ),
        (
            lambda: patterns.HipSearch(2, 2).step(NEW, CACHE, LENS[:1]),
            ValueError,
            r"seq_lens must have shape \[2\], got \[1\]",
        ),
        (
            lambda: patterns.HipSearch(2, 2).step(NEW, CACHE, LENS.float()),
            TypeError,
            r"seq_lens must be a tensor of integers, got torch\.float32",
        ),
        (
            lambda: patterns.HipSearch(2, 2).step(NEW, CACHE, LENS, TABLE[:, None, None]),
            ValueError,
            r"page_table must have shape \[2, n\] or \[2, 2, n\], n at least 1, got \[2, 1, 1, 4\]",
        ),
        (
            lambda: patterns.HipSearch(2, 2, device="meta").step(NEW, CACHE, LENS),
            ValueError,
            "q must be on the device of the search, meta, got cpu",
        ),
    ],
)
def test_errors_of_decoding(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keys": 0}, ValueError, "keys must be at least 1, got 0"),
        ({"keys": 33}, ValueError, "keys must be a multiple of granule = 2, got 33"),
        ({"granule": 0}, ValueError, "granule must be at least 1, got 0"),
        ({"sample": 0}, ValueError, "sample must be at least 1, got 0"),
        ({"local": -1}, ValueError, "local must be at least 0, got -1"),
        ({"first": 1.5}, TypeError, r"first must be an int, got 1\.5"),
        ({"block_q": 32}, ValueError, "block_q must be a multiple of 64 from 64 to 2048, got 32"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        patterns.hip(Q, Q, **options)
