"""Softmax skipping: the fp64 reference over the same groups and tiles skips the same tiles.

Which rows and keys go together is worked out here from docs/design.md, "Skipping".
"""

import pytest
import torch
from skip_cases import check, inputs, rows
from skip_windows import neighborhood_tiles

import sparse_fmha
from sparse_fmha import SkipStats, reference

TILE_K = {64: 80, 128: 80, 256: 80}  # keys of a tile of the dense kernels, by head dim


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("length", "kv"), [(500, 500), (130, 500), (500, 130), (64, 1000)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.3])
def test_attention(threshold, causal, length, kv, dim):
    q, k, v = inputs(length, kv, dim=dim)
    visible = reference.causal_mask(length, kv) if causal else torch.ones(length, kv).bool()
    tiles = reference.tile_ranks(kv, TILE_K[dim], descending=True)
    tiles = tiles.expand(1, -(-length // 64), -1)
    stats = check(
        sparse_fmha.attention, q, k, v, visible, rows(length), tiles, threshold, causal=causal
    )
    assert (stats.skipped == 0).all() if threshold == 0 else True
    if threshold == 0.3 and kv > 130:
        assert (stats.skipped > 0).any()
        assert (stats.skipped < stats.visited).all()


@pytest.mark.parametrize(
    ("grid", "window", "options"),
    [
        ((700,), (300,), {}),
        ((700,), (257,), {"stride": 16, "causal": True}),
        ((24, 40), (11, 15), {"stride": (2, 3)}),
        ((24, 40), (9, 9), {"dilation": (2, 3), "causal": (True, False)}),
        ((8, 9, 16), (4, 5, 7), {}),
        ((24, 40), (11, 15), {"extra": 100}),
        ((400,), (150,), {"extra": 128}),
    ],
)
@pytest.mark.parametrize("threshold", [1e-3, 0.3])
def test_neighborhood(threshold, grid, window, options):
    options = dict(options)
    extra = options.pop("extra", 0)
    q, k, v = (x.unflatten(1, grid) for x in inputs(torch.Size(grid).numel(), dim=128, batch=1))
    more = inputs(extra, dim=128, batch=1, seed=1)[1:] if extra else (None, None)
    groups, tiles = neighborhood_tiles(grid, window, extra, **options)
    visible = reference.neighborhood_mask(grid, window, extra=extra, **options)
    if extra:

        def function(q, k, v, *args, **kwargs):
            # The reference has the extra tokens after the grid's.
            length = torch.Size(grid).numel()
            extra_k, extra_v = (x[:, length:] for x in (k, v))
            k, v = (x[:, :length].unflatten(1, grid) for x in (k, v))
            return sparse_fmha.neighborhood_attention(
                q, k, v, *args, extra_k=extra_k, extra_v=extra_v, **kwargs
            )

        k, v = (torch.cat([x.flatten(1, -3), y], 1) for x, y in zip((k, v), more, strict=True))
    else:
        function = sparse_fmha.neighborhood_attention
    stats = check(function, q, k, v, visible, groups, tiles, threshold, window, **options)
    if threshold == 0.3:
        assert (stats.skipped > 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    """Nothing near the threshold here: the same tiles as in fp64 of the same numbers."""
    q, k, v = (x.to(dtype) for x in inputs())
    exact = [x.double() for x in (q, k, v)]
    kwargs = dict(causal=True, skip_threshold=0.1, return_stats=True)
    out, stats = sparse_fmha.attention(q, k, v, **kwargs)
    wanted, wanted_stats = sparse_fmha.attention(*exact, **kwargs)
    assert stats.skipped.sum() > 0
    assert stats.visited.equal(wanted_stats.visited)
    assert (stats.skipped - wanted_stats.skipped).abs().sum() <= 1
    if stats.skipped.equal(wanted_stats.skipped):
        unit = torch.finfo(dtype).eps / 2  # of a weight and of the result, which are rounded
        error = out.double() - wanted
        assert error.abs().max() <= 2 * unit * v.abs().max() + 1e-5
        assert error.square().mean().sqrt() <= 2 * unit * wanted.square().mean().sqrt() + 1e-6


def test_a_threshold_for_each_batch_entry():
    q, k, v = inputs(batch=3)
    each = [0.0, 0.01, 0.5]
    given = torch.tensor(each)
    together = sparse_fmha.attention(q, k, v, skip_threshold=given, return_stats=True)
    for b, threshold in enumerate(each):
        one = (x[b : b + 1] for x in (q, k, v))
        out, stats = sparse_fmha.attention(*one, skip_threshold=threshold, return_stats=True)
        assert out.equal(together[0][b : b + 1])
        assert stats.skipped.equal(together[1].skipped[b : b + 1])
    assert together[1].skipped[0].sum() == 0
    assert together[1].skipped[2].sum() > 0


def test_values_out_of_range_are_held_to_it():
    q, k, v = inputs(batch=4)
    odd = torch.tensor([-1.0, float("nan"), 1.0, 7.0])
    held = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24])
    odd, held = (
        sparse_fmha.attention(q, k, v, skip_threshold=t, return_stats=True) for t in (odd, held)
    )
    assert odd[0].equal(held[0])
    assert odd[1].skipped.equal(held[1].skipped)
    assert odd[1].skipped[:2].sum() == 0
    assert odd[1].skipped[2:].sum() > 0


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-30])
def test_scales(scale):
    q, k, v = inputs()
    tiles = reference.tile_ranks(500, 80, descending=True).expand(1, 8, -1)
    every = torch.ones(500, 500, dtype=torch.bool)
    stats = check(sparse_fmha.attention, q, k, v, every, rows(500), tiles, 0.2, scale=scale)
    assert bool((stats.skipped > 0).any()) == (scale == -0.2)


def test_results_and_counts():
    q, k, v = inputs(length=300)
    plain = sparse_fmha.attention(q, k, v, return_lse=True)
    out, lse, stats = sparse_fmha.attention(q, k, v, return_lse=True, return_stats=True)
    torch.testing.assert_close((out, lse), plain)
    assert isinstance(stats, SkipStats)
    assert stats.visited.tolist() == [[5 * 4] * 4] * 2
    assert stats.sparsity.tolist() == [[0.0] * 4] * 2
    out, stats = sparse_fmha.attention(q, k[:, :0], v[:, :0], return_stats=True, skip_threshold=0.1)
    assert out.eq(0).all()
    assert stats.visited.tolist() == stats.skipped.tolist() == [[0] * 4] * 2
    assert stats.sparsity.eq(0).all()
    empty = (x[:0] for x in (q, k, v))
    out, stats = sparse_fmha.attention(*empty, return_stats=True, skip_threshold=0.1)
    assert out.shape == (0, 300, 4, 64)
    assert stats.visited.shape == (0, 4)
