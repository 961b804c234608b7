"""Methods that choose keys of a cache, each against its definition."""

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import decode_attention, patterns


def pages_of(batch, pages, page, heads, dim, lengths, seed=0):
    """A cache in shuffled pages, NaN where nothing is written, and its page table."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.full((2, batch * pages + 2, page, heads, dim), torch.nan)
    table = torch.randperm(batch * pages + 2, generator=generator)[: batch * pages]
    table = table.view(batch, pages).int()
    for b, length in enumerate(lengths):
        for j in range(length):
            at = int(table[b, j // page]), j % page
            k[at], v[at] = torch.randn(2, heads, dim, generator=generator)
    return k, v, table


def rows_of(table, page, lengths):
    """[(request, position, row of the cache)] of all tokens."""
    return [
        (b, j, int(table[b, j // page]) * page + j % page)
        for b, length in enumerate(lengths)
        for j in range(length)
    ]


def bounds_of(k, table, lengths):
    """Written in pieces, the keys of a page in one or in several."""
    pages, page, heads, dim = k.shape
    bounds = patterns.PageBounds(pages, page, heads, dim)
    bounds.write(k.new_full((2, heads, dim), 99.0), torch.tensor([0, page * (pages - 1)]))
    rows = torch.tensor([row for _, _, row in rows_of(table, page, lengths)])
    for part in rows.split(7):
        padded = torch.cat((part, torch.tensor([-1])))
        keys = torch.cat((k.flatten(0, 1)[part], k.new_full((1, heads, dim), torch.nan)))
        bounds.write(keys, padded)
    return bounds


@pytest.mark.parametrize("page", [4, 16])
def test_page_bounds(page):
    lengths = [50, 1, page, 33]
    k, _, table = pages_of(4, 16, page, 2, 8, lengths)
    bounds = bounds_of(k, table, lengths)
    for b, length in enumerate(lengths):
        for i in range(-(-length // page)):
            keys = k[table[b, i], : length - i * page]
            assert bounds.low[table[b, i]].equal(keys.amin(0))
            assert bounds.high[table[b, i]].equal(keys.amax(0))


def chosen_by_definition(q, k, table, lengths, page, budget):
    """{(request, head): its pages}"""
    heads = k.shape[2]
    found = {}
    for b, length in enumerate(lengths):
        for h in range(heads):
            last = (length - 1) // page
            scores = []
            for i in range(max(last, 0)):
                keys = k[table[b, i], :, h].double()
                low, high = keys.amin(0), keys.amax(0)
                rows = q[b, 0].unflatten(0, (heads, -1))[h].double()
                scores.append(torch.maximum(rows * low, rows * high).sum().item())
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[: budget // page]
            found[b, h] = [last, *sorted(best)] if length else []
    return found


@pytest.mark.parametrize(("page", "budget"), [(16, 32), (16, 70), (4, 8), (16, 1000)])
def test_quest(page, budget):
    lengths = [100, 0, 1, page, page + 1, 64]
    batch, heads, width = len(lengths), 2, -(-128 // page)
    k, v, table = pages_of(batch, width, page, heads, 8, lengths)
    q = torch.randn(batch, 1, 6, 8)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    bounds = bounds_of(k, table, lengths)
    table[0, -1] = -1  # behind the keys
    with Watch():
        blocks = patterns.quest(q, bounds, seq_lens, table, budget=budget)
        own = patterns.quest_page_table(blocks, seq_lens, table)
    indices, counts, _ = blocks
    wanted = chosen_by_definition(q, k, table, lengths, page, budget)
    for (b, h), pages in wanted.items():
        assert indices[b, h, : counts[b, h]].tolist() == pages

    tokens = torch.full((batch, 1, heads, 128), -1, dtype=torch.int32)
    for (b, h), pages in wanted.items():
        listed = [j for i in pages for j in range(i * page, min(i * page + page, lengths[b]))]
        tokens[b, 0, h, : len(listed)] = torch.tensor(listed)
    exact = decode_attention(q, k, v, seq_lens, page_table=table, tokens=(tokens, None))
    physical = decode_attention(q, k, v, own[1], page_table=own[0])
    torch.testing.assert_close(physical, exact)
    if page == 16:
        logical = decode_attention(q, k, v, seq_lens, page_table=table, blocks=blocks)
        torch.testing.assert_close(logical, exact)
    if budget == 1000:
        dense = decode_attention(q, k, v, seq_lens, page_table=table)
        torch.testing.assert_close(physical, dense)


def test_quest_of_a_contiguous_cache():
    lengths = torch.tensor([128, 70], dtype=torch.int32)
    k, v = torch.randn(2, 2, 128, 2, 8)
    q = torch.randn(2, 1, 4, 8)
    bounds = patterns.PageBounds(16, 16, 2, 8)
    bounds.write(k.flatten(0, 1), torch.arange(256))
    blocks = patterns.quest(q, bounds, lengths, budget=48)
    paged = k.unflatten(1, (8, 16)).flatten(0, 1)
    table = torch.arange(16).view(2, 8)
    bounds = bounds_of(paged, table, lengths.tolist())
    for got, wanted in zip(
        blocks[:2], patterns.quest(q, bounds, lengths, table, budget=48)[:2], strict=True
    ):
        assert got.equal(wanted)
    assert decode_attention(q, k, v, lengths, blocks=blocks).isfinite().all()


def snapkv_scores(q, k, last, pool):
    """[B, Hkv, L], token by token."""
    (batch, length, heads_q, dim), heads = q.shape, k.shape[2]
    scores = torch.zeros(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads_q):
            for i in range(max(0, length - last), length):
                keys = k[b, : i + 1, h * heads // heads_q].double()
                weights = (keys @ q[b, i, h].double() * dim**-0.5).softmax(0)
                scores[b, h * heads // heads_q, : i + 1] += weights
    around = torch.zeros_like(scores)
    for j in range(length):
        near = scores[..., max(0, j - pool // 2) : j + pool // 2 + 1]
        around[..., j] = near.sum(-1) / pool
    return around


@pytest.mark.parametrize("floor", [None, 0.0, 0.2, 1.0])
def test_snapkv(floor):
    length, heads, keep = 90, 3, 20
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, length, 6, 8, generator=generator)
    k = (
        torch.randn(2, length, heads, 8, generator=generator)
        * torch.tensor([1.0, 2.0, 3.0])[:, None]
    )
    options = {"keep": keep, "last": 10, "pool": 5, "sink": 2, "recent": 6}
    indices, counts = patterns.snapkv(q, k, **options, floor=floor)
    scores = snapkv_scores(q, k, 10, 5)
    scores[..., :2] = scores[..., -6:] = torch.inf
    for b in range(2):
        ranked = sorted(
            ((h, j) for h in range(heads) for j in range(length)), key=lambda x: -scores[b][x]
        )[: keep * heads]
        for h in range(heads):
            wanted = keep
            if floor is not None:
                own = sum(head == h for head, _ in ranked)
                wanted = max(round((1 - floor) * own + floor * keep), 8)
            best = sorted(range(length), key=lambda j: -scores[b, h, j])[:wanted]
            assert indices[b, h, : counts[b, h]].tolist() == sorted(best)
            assert indices[b, h, counts[b, h] :].eq(-1).all()


def test_a_cache_of_kept_rows():
    q = torch.randn(2, 60, 4, 8)
    k, v = torch.randn(2, 2, 60, 2, 8)
    indices, counts = patterns.snapkv(q, k, keep=12, last=8, pool=3, recent=4, floor=0.2)
    new_q, (new_k, new_v) = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 2, 8)
    caches = []
    for cache, new in ((k, new_k), (v, new_v)):
        kept = patterns.kept_rows(cache, indices, room=1)
        kept.scatter_(1, counts.long()[:, None, :, None].expand(-1, 1, -1, 8), new[:, None])
        caches.append(kept)
    out = decode_attention(new_q, *caches, counts + 1)
    whole = [torch.cat((cache, new[:, None]), 1) for cache, new in ((k, new_k), (v, new_v))]
    newest = torch.full((2, 2, 1), 60, dtype=torch.int32)
    tokens = torch.cat((indices, newest), -1)[:, None]
    lengths = torch.tensor([61, 61], dtype=torch.int32)
    torch.testing.assert_close(out, decode_attention(new_q, *whole, lengths, tokens=(tokens, None)))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("budget must be at least 16", lambda q, b, n: patterns.quest(q, b, n, budget=3)),
        ("seq_lens must have shape", lambda q, b, n: patterns.quest(q, b, n[:1])),
        (
            "q must have shape .*a multiple of 2, 8",
            lambda q, b, n: patterns.quest(q[..., :4], b, n),
        ),
        (
            "a multiple of 2 pages without a page_table, got 5",
            lambda q, b, n: patterns.quest(q, b, n),
        ),
        ("page_table must have shape", lambda q, b, n: patterns.quest(q, b, n, n)),
        ("k must have shape", lambda q, b, n: b.write(q, n)),
        ("rows must have shape", lambda q, b, n: b.write(q[:, 0, :2], n[:1])),
        ("page must be at least 1", lambda q, b, n: patterns.PageBounds(4, 0, 2, 8)),
        ("pool must be odd, got 4", lambda q, b, n: patterns.snapkv(q, q, pool=4)),
        ("keep must be at least 132", lambda q, b, n: patterns.snapkv(q, q, keep=3)),
        ("floor must be from 0 to 1", lambda q, b, n: patterns.snapkv(q, q, floor=2)),
        (
            "block_kv must be 16, 32",
            lambda q, b, n: patterns.power_attention_cache(n, 9, block_kv=48),
        ),
        (
            "must divide .*block of 32",
            lambda q, b, n: patterns.s2_attention_cache(n, 9, 2, block=32),
        ),
        (
            "total_heads must be at least 2",
            lambda q, b, n: patterns.s2_attention_cache(n, 9, 2, total_heads=1),
        ),
        ("window must be at least 1", lambda q, b, n: patterns.streaming_llm_cache(n, window=0)),
        ("room must be at least 0", lambda q, b, n: patterns.kept_rows(q, n, -1)),
    ],
)
def test_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 1, 4, 8), patterns.PageBounds(5, 16, 2, 8), torch.tensor([1, 1]))


def lists_as_masks(blocks, length):
    """bool [B, H, length] of the tokens in the lists; none is there twice."""
    indices, counts, block = blocks
    found = torch.zeros(*counts.shape, length + block, dtype=torch.int64)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        for entry in indices[tuple(at)][: counts[tuple(at)]].tolist():
            found[(*at, slice(entry * block, entry * block + block))] += 1
    assert found.max() <= 1
    return found[..., :length] > 0


LENGTHS = [1, 64, 65, 700, 1001, 1500]


@pytest.mark.parametrize(("sink", "local"), [(1, 5), (0, 1), (3, 2)])
def test_power_attention_cache(sink, local):
    lengths = torch.tensor([0, *LENGTHS])
    options = {"sink_blocks": sink, "local_blocks": local, "block": 64}
    with Watch():
        blocks = patterns.power_attention_cache(lengths, 1500, **options, block_kv=32)
    masks = lists_as_masks(blocks, 1600)
    assert not masks[0].any()
    for b, n in enumerate(LENGTHS, 1):
        mask = patterns.power_attention(n, n, **options, block_q=64, block_kv=64).to_dense()
        assert masks[b, 0, :n].equal(mask[0, 0, -1])


@pytest.mark.parametrize(("local", "stride"), [(3, 4), (1, 5), (16, 8)])
def test_s2_attention_cache(local, stride):
    lengths = torch.tensor([0, *LENGTHS])
    options = {"local_blocks": local, "stride": stride, "head_offset": 1, "total_heads": 4}
    with Watch():
        blocks = patterns.s2_attention_cache(lengths, 1500, 3, **options)
    masks = lists_as_masks(blocks, 1600)
    assert not masks[0].any()
    for b, n in enumerate(LENGTHS, 1):
        mask = patterns.s2_attention(n, n, 3, **options).to_dense()
        assert masks[b, :, :n].equal(mask[0, :, -1])


@pytest.mark.parametrize("sink", [0, 3])
def test_a_ring_holds_what_streaming_llm_sees(sink):
    window, steps = 10, 40
    k, v = torch.randn(2, 1, steps, 2, 8)
    ring_k, ring_v = torch.full((2, 1, sink + window, 2, 8), torch.nan)
    visible = patterns.streaming_llm(steps, steps, window=window, sink=sink).to_dense()[0, 0]
    for p in range(steps):
        row = patterns.streaming_llm_cache(torch.tensor([p]), window=window, sink=sink)
        ring_k[:, row], ring_v[:, row] = k[:, p : p + 1], v[:, p : p + 1]
        q = torch.randn(1, 1, 4, 8)
        lengths = torch.tensor([min(p + 1, sink + window)], dtype=torch.int32)
        out = decode_attention(q, ring_k, ring_v, lengths)
        tokens = visible[p].nonzero().int().reshape(1, 1, 1, -1)
        whole = torch.tensor([p + 1], dtype=torch.int32)
        torch.testing.assert_close(out, decode_attention(q, k, v, whole, tokens=(tokens, None)))
