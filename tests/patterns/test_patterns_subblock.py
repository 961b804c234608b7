"""Scores of pieces of blocks against their definition in fp64."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import BlockGrid, patterns


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definition(q, k, keep, piece, block_q, block_kv, causal, scale=None, forced=None):
    """The chosen blocks, bool [B, Hq, nQ, nK], by loops over rows."""
    q_len, kv_len, heads = q.shape[1], k.shape[1], q.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(heads // k.shape[2], 2)
    a, b = (torch.stack([p.double().mean(1) for p in x.split(piece, 1)], 1) for x in (q, k))
    sums = (scale * torch.einsum("bihd,bjhd->bhij", a, b)).exp()
    i, j = (torch.arange(n) for n in sums.shape[2:])
    if causal:
        last = ((i + 1) * piece).clamp(max=q_len) - 1 + kv_len - q_len
        sums = sums * (j * piece <= last[:, None])
    of_q, of_k = i // (block_q // piece), j // (block_kv // piece)
    scores = torch.zeros(*sums.shape[:2], int(of_q[-1]) + 1, int(of_k[-1]) + 1).double()
    for r in range(scores.shape[2]):
        for c in range(scores.shape[3]):
            scores[:, :, r, c] = sums[:, :, of_q == r][..., of_k == c].sum((2, 3))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if forced is not None:
        chosen |= forced
    for row, own in zip(scores.flatten(0, 2), chosen.flatten(0, 2), strict=True):
        free = [n for n in range(len(row)) if row[n] > 0 and not own[n]]
        count = math.ceil(keep * len(free) - 1e-9)
        for n in sorted(free, key=lambda n: -row[n])[:count]:
            own[n] = True
    return chosen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "keep", "piece", "block_q", "block_kv"),
    [(320, 320, 0.25, 16, 64, 64), (300, 410, 0.4, 8, 64, 32), (200, 150, 0.5, 32, 128, 64)],
)
def test_definition(q_len, kv_len, keep, piece, block_q, block_kv, causal):
    q, k = 2 * normal(2, q_len, 4, 16), normal(2, kv_len, 2, 16, seed=1)
    options = {"keep": keep, "piece": piece, "block_q": block_q, "block_kv": block_kv}
    with Watch():
        mask = patterns.subblock(q, k, causal=causal, **options)
    mask.validate()
    assert mask.causal == causal
    assert torch.equal(mask.blocks(), definition(q, k, causal=causal, **options))


def test_one_piece_counts():
    """A block with one piece that matters, which its mean hides."""
    q, k = torch.ones(1, 64, 1, 16), torch.zeros(1, 256, 1, 16)
    k[:, 64:80] = 3  # the others of the block are below 0, so that its mean is 0
    k[:, 80:128] = -1
    k[:, 128:192] = 0.1
    mask = patterns.subblock(q, k, keep=0.25)
    assert mask.blocks()[0, 0, 0].tolist() == [False, True, False, False]


def test_forced():
    q, k = normal(2, 320, 4, 16), normal(2, 320, 2, 16, seed=1)
    forced = BlockGrid.of(q, k, 64, 64).tokens(-70)
    mask = patterns.subblock(q, k, keep=0.3, scale=0.5, forced=forced)
    expected = definition(q, k, 0.3, 16, 64, 64, False, 0.5, forced)
    assert torch.equal(mask.blocks(), expected)


Q = normal(1, 64, 2, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 1.5}, ValueError, r"keep must be from 0 to 1, got 1\.5"),
        ({"piece": 24}, ValueError, "piece must divide block_q = 64, got 24"),
        ({"piece": 0}, ValueError, "piece must be at least 1, got 0"),
        ({"block_kv": 48}, ValueError, "block_kv must be 16, 32, 64 or 128, got 48"),
        ({"forced": Q}, TypeError, r"forced must be a bool tensor, got torch\.float32"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        patterns.subblock(Q, Q, **options)
