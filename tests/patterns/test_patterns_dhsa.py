"""DHSA against its definition, key by key."""

import itertools

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import block_sparse_attention, patterns, stripe_attention
from sparse_fmha.masks import block_lists
from sparse_fmha.reference import causal_mask
from sparse_fmha.selection import reductions


def definition(q, k, boundaries, keys, local, first, window, dense_rows, normalize, shared, block):
    """Bool [B, H, Lq, Lkv] by loops over blocks and keys."""
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[2], 2)
    if shared:
        q, k, heads = q.mean(2, keepdim=True), k.mean(2, keepdim=True), 1
    seen = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        edges = boundaries[b % len(boundaries)].tolist()
        for h in range(heads):
            for start in range(0, q_len, block):
                stop = min(start + block, q_len)
                mean, end = q[b, start:stop, h].mean(0), stop + kv_len - q_len
                scores = torch.zeros(kv_len, dtype=torch.float64)
                for low, high in itertools.pairwise(edges):
                    if high > low:
                        factor = (high - low) ** 0.5 if normalize else 1
                        scores[low:high] = factor * (k[b, low:high, h].mean(0) @ mean)
                least = max(0, end - window) if window else 0
                begin = max(least, end - local)
                before = sorted(range(least, begin), key=lambda j: (j >= least + first, -scores[j]))
                taken = [*before[: keys - local], *range(begin, end)]
                if stop > q_len - dense_rows:
                    taken = list(range(least, end))
                seen[b, h, start:stop, taken] = True
    return seen & causal_mask(q_len, kv_len)


BOUNDS = torch.tensor(
    [[0, 7, 20, 21, 90, 90, 133, 250, 300], [0, 50, 60, 61, 62, 150, 299, 300, 300]]
)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("q_len", "keys", "local", "first", "window", "dense_rows", "normalize", "block_q"),
    [
        (300, 120, 64, 10, None, 0, True, 64),
        (300, 200, 128, 0, None, 64, True, 64),
        (257, 150, 64, 30, 170, 10, False, 128),
        (130, 90, 0, 64, None, 1, True, 64),
        (300, 1000, 64, 128, None, 0, True, 64),
    ],
)
def test_the_definition(
    randn, monkeypatch, q_len, keys, local, first, window, dense_rows, normalize, shared, block_q
):
    q, k = randn(2, q_len, 4, 16), randn(2, 300, 2, 16, seed=1)
    options = {
        "local": local,
        "first": first,
        "window": window,
        "dense_rows": dense_rows,
        "normalize": normalize,
        "shared": shared,
    }
    mask = patterns.dhsa(q, k, BOUNDS, keys, block_q=block_q, **options)
    mask.validate()
    assert mask.to_dense().equal(definition(q, k, BOUNDS, keys, *options.values(), block_q))

    def one_by_one(rows, *_):
        return [slice(row, row + 1) for row in range(rows)]

    monkeypatch.setattr(block_lists, "chunks", one_by_one)
    again = patterns.dhsa(q, k, BOUNDS, keys, block_q=block_q, **options)
    assert again.to_dense().equal(mask.to_dense())


@pytest.mark.parametrize("first", [0, 20])
def test_equal_scores(first):
    """Whole numbers, and chunks of 1, 4, 16 and 64 keys, whose roots are exact; some are empty."""
    generator = torch.Generator().manual_seed(first)
    q, k = (torch.randint(-1, 2, (1, 320, h, 16), generator=generator).float() for h in (2, 1))
    k = k[:, torch.arange(320) % 64]
    edges = torch.tensor([[0, 1, 2, 3, 7, 23, 23, 39, 55, 59, 63, 64, 128, 192, 256, 320, 320]])
    for keys in (64 + first, 150, 200):
        mask = patterns.dhsa(q, k, edges, keys, local=64, first=first, dense_rows=0, shared=False)
        wanted = definition(q, k, edges, keys, 64, first, None, 0, True, False, 64)
        assert mask.to_dense().equal(wanted)


def test_from_q_k_v_to_the_output(randn, agrees):
    q, k, v = randn(2, 300, 4, 32), *(randn(2, 300, 2, 32, seed=s) for s in (1, 2))
    boundaries = patterns.dhsa_boundaries(patterns.dhsa_ratios(q, k), 20)
    mask = patterns.dhsa(q, k, boundaries, 150, local=64, first=16)
    visible = definition(q, k, boundaries, 150, 64, 16, None, 64, True, True, 64)
    agrees(*stripe_attention(q, k, v, mask, return_lse=True), q, k, v, visible)
    mask = patterns.dhsa_blocks(q, k, density=0.3)
    agrees(*block_sparse_attention(q, k, v, mask, return_lse=True), q, k, v, mask.to_dense())


def test_a_layer_of_gemma_2(randn):
    """A window, head dim 256 and capped scores, in one mask and call."""
    q, k, v = (randn(1, 200, h, 256, seed=n) for n, h in enumerate((2, 1, 1)))
    edges = torch.arange(0, 201, 20)[None]
    mask = patterns.dhsa(q, k, edges, 110, local=64, first=16, window=130, dense_rows=0)
    visible = definition(q, k, edges, 110, 64, 16, 130, 0, True, True, 64)
    assert mask.to_dense().equal(visible)
    out = stripe_attention(q, k, v, mask, softcap=5.0, scale=1.0)
    scores = torch.einsum("bihd,bjd->bhij", q.double(), k[:, :, 0].double())
    shares = (5 * (scores / 5).tanh()).masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjd->bihd", shares, v[:, :, 0].double())
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 4])
def test_ratios(randn, window):
    q, k = 2 * randn(2, 60, 4, 16), randn(2, 60, 2, 16, seed=1)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2)) / 4
    weights = scores.masked_fill(~causal_mask(60, 60), -torch.inf).softmax(-1).mean(1)
    expected = torch.zeros(2, 60, dtype=torch.float64)
    for c in range(2 * window - 1, 60 - 2 * window):
        below = weights[:, c + window :]
        past = below[..., c - window + 1 : c + 1].sum((1, 2)) + 1e-6
        future = below[..., c + 1 : c + window + 1].sum((1, 2)) + 1e-6
        expected[:, c] = torch.maximum(past, future) / torch.minimum(past, future)
    made = patterns.dhsa_ratios(q, k, window=window)
    torch.testing.assert_close(made.double(), expected, rtol=2e-4, atol=1e-4)
    assert not patterns.dhsa_ratios(q[:, :3], k[:, :3]).any()


def greedy(ratios, chunks, theta, distance):
    taken = []
    for at in sorted(range(len(ratios)), key=lambda c: -ratios[c]):
        if ratios[at] > theta and all(abs(at - other) > distance for other in taken):
            taken.append(at)
    ends = sorted(at + 1 for at in taken[:chunks])
    return [0, *ends] + [len(ratios)] * (chunks + 1 - len(ends))


@pytest.mark.parametrize(("chunks", "theta", "distance"), [(5, 1.1, 8), (40, 0.5, 0), (0, 1, 1)])
def test_boundaries(randn, chunks, theta, distance):
    ratios = 1 + randn(2, 100)
    ratios[0, 3] = torch.nan
    made = patterns.dhsa_boundaries(ratios, chunks, theta=theta, distance=distance)
    for row, own in zip(made.tolist(), ratios.nan_to_num(-9).tolist(), strict=True):
        assert row == greedy(own, chunks, theta, distance)
    assert patterns.dhsa_boundaries(torch.zeros(1, 0), 2).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("density", [0, 0.2, 1])
def test_blocks(randn, forced, shared, density):
    q, k = randn(1, 600, 4, 16), randn(1, 700, 2, 16, seed=1)
    mask = patterns.dhsa_blocks(q, k, density=density, forced=forced, shared=shared)
    mask.validate()
    assert (mask.block_q, mask.block_kv, mask.causal) == (128, 32, True)
    q, k = q.double(), k.double().repeat_interleave(2, 2)
    if shared:
        q, k = q.mean(2, keepdim=True), k.mean(2, keepdim=True)
    expected = torch.zeros(1, q.shape[2], 5, 22, dtype=torch.bool)
    for h in range(q.shape[2]):
        for row, part in enumerate(q[0, :, h].split(128)):
            last = (min(128 * (row + 1), 600) + 100 - 1) // 32
            scores = [float(part.mean(0) @ own.mean(0)) for own in k[0, :, h].split(32)]
            fixed = {0, last} if forced else set()
            order = sorted(range(last + 1), key=lambda j: (j not in fixed, -scores[j]))
            taken = order[: max(int(density * 22), 2 if forced else 1)]
            expected[0, h, row, taken] = True
    assert mask.blocks().equal(expected)


def test_without_the_host(randn, monkeypatch):
    monkeypatch.setattr(reductions, "SLICE", 1 << 16)
    q, k = randn(1, 1024, 4, 16), randn(1, 1024, 2, 16)
    ratios = randn(1, 1024)
    with Watch() as watch:
        boundaries = patterns.dhsa_boundaries(ratios, 30, theta=0)
        mask = patterns.dhsa(q, k, boundaries, 300, shared=False)
        patterns.dhsa_blocks(q, k)
        patterns.dhsa_ratios(q, k)
    mask.validate()
    assert watch.largest < 1024 * 1024 // 2
    on_meta = patterns.dhsa(*(x.to("meta") for x in (q, k, boundaries)), 300)
    assert on_meta.columns.shape == (1, 1, 16, 300 - 128)


Q = torch.zeros(1, 9, 2, 16)
EDGES = torch.tensor([[0, 9]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: patterns.dhsa(Q, Q, EDGES, 100),
            ValueError,
            r"keys must be at least local \+ first = 128 \+ 128, got 100",
        ),
        (
            lambda: patterns.dhsa(Q, Q, EDGES, 300, local=65),
            ValueError,
            "local must be a multiple of range_size = 64, got 65",
        ),
        (
            lambda: patterns.dhsa(Q, Q, EDGES, 300, window=0),
            ValueError,
            "window must be at least 1, got 0",
        ),
        (
            lambda: patterns.dhsa(Q, Q[:, :5], EDGES, 300),
            ValueError,
            "k must have at least the 9 tokens of q, got 5",
        ),
        (
            lambda: patterns.dhsa(Q, Q, EDGES[0], 300),
            ValueError,
            r"boundaries must have shape \[1 or 1, chunks \+ 1\], with at least one",
        ),
        (
            lambda: patterns.dhsa(Q, Q, EDGES.float(), 300),
            TypeError,
            r"boundaries must be an int32 or int64 tensor, got torch\.float32",
        ),
        (
            lambda: patterns.dhsa(Q, Q, EDGES, 300, shared=1),
            TypeError,
            "shared must be True or False, got 1",
        ),
        (
            lambda: patterns.dhsa(Q, Q, EDGES, 300, block_q=32),
            ValueError,
            "block_q must be a multiple of 64 from 64 to 2048, got 32",
        ),
        (
            lambda: patterns.dhsa_blocks(Q, Q, density=2),
            ValueError,
            "density must be from 0 to 1, got 2",
        ),
        (
            lambda: patterns.dhsa_ratios(Q, Q[:, :5]),
            ValueError,
            "k must have the 9 tokens of q, got 5",
        ),
        (
            lambda: patterns.dhsa_ratios(Q, Q, window=0),
            ValueError,
            "window must be at least 1, got 0",
        ),
        (
            lambda: patterns.dhsa_boundaries(EDGES, 3),
            TypeError,
            r"ratios must have a floating point dtype, got torch\.int64",
        ),
        (
            lambda: patterns.dhsa_boundaries(Q[0, 0], -3),
            ValueError,
            "chunks must be at least 0, got -3",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
