"""Softmax skipping on the GPU: the tiles that the CPU op skips, which the fp64 reference proves."""

import functools

import pytest
import torch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask

pytestmark = pytest.mark.gpu
THRESHOLDS = (0.0, 1e-3, 0.05, 0.5)


def inputs(length, heads=4, heads_kv=2, dim=128, batch=2, dtype=torch.bfloat16, seed=0):
    """All queries of a head look in one direction, along which runs of 30 keys lie together."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(batch, *shape, generator=generator)

    way = torch.nn.functional.normalize(randn(1, heads_kv, dim), dim=-1)
    along = randn(-(-length // 30), heads_kv, 1).repeat_interleave(30, 1)[:, :length]
    q = dim**0.5 * way.repeat_interleave(heads // heads_kv, 2) + 0.1 * randn(length, heads, dim)
    k = 4 * along * way + 0.1 * randn(length, heads_kv, dim)
    return [x.to(dtype) for x in (q, k, randn(length, heads_kv, dim))]


def calls(length):
    """function(q, k, v, **options) of each mechanism, for either device."""

    def dense(q, k, v, **options):
        return sparse_fmha.attention(q, k, v, **options)

    def causal(q, k, v, **options):
        return sparse_fmha.attention(q, k, v, causal=True, **options)

    def grid(q, k, v, **options):
        q, k, v = (x.unflatten(1, (length // 20, 20)) for x in (q, k, v))
        return sparse_fmha.neighborhood_attention(q, k, v, (length // 40, 11), **options)

    def blocks(q, k, v, size=(128, 64), **options):
        drawn = torch.rand(1, q.shape[2], -(-length // size[0]), -(-length // size[1]),
                           generator=torch.Generator().manual_seed(1)) < 0.6  # fmt: skip
        mask = BlockMask.from_blocks(drawn, length, length, *size, causal=True).to(q.device)
        return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)

    def partial(q, k, v, **options):
        pairs = torch.rand(1, 1, length, length, generator=torch.Generator().manual_seed(1)) < 0.6
        mask = BlockMask.from_dense(pairs, 128, 128).to(q.device)
        return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)

    def stripes(q, k, v, **options):
        groups = -(-length // 192)
        drawn = torch.rand(1, 1, groups, length, generator=torch.Generator().manual_seed(1)) < 0.4
        mask = StripeMask.from_columns(drawn, length, 192, causal=True).to(q.device)
        return sparse_fmha.stripe_attention(q, k, v, mask, **options)

    return {
        "dense": dense,
        "causal": causal,
        "grid": grid,
        "blocks": blocks,
        "pairs of blocks": functools.partial(blocks, size=(64, 32)),
        "partial blocks": partial,
        "stripes": stripes,
    }


@pytest.mark.parametrize("name", calls(20))
@pytest.mark.parametrize("dim", [40, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_on_the_cpu(cuda, name, dim, dtype):
    length = 1000
    call, given = calls(length)[name], inputs(length, dim=dim, dtype=dtype)
    for threshold in THRESHOLDS:
        options = dict(skip_threshold=threshold, return_lse=True, return_stats=True)
        out, lse, stats = call(*(x.to(cuda) for x in given), **options)
        wanted, wanted_lse, wanted_stats = call(*given, **options)
        assert stats.visited.cpu().equal(wanted_stats.visited)
        off = (stats.skipped.cpu() - wanted_stats.skipped).abs()
        assert (off <= 0.01 * wanted_stats.visited).all()  # those within rounding of the threshold
        for b, h in (off == 0).nonzero().tolist():
            # A weight that one of them drops is below the threshold, and so rarely seen here.
            torch.testing.assert_close(
                out[b, ..., h, :].cpu(), wanted[b, ..., h, :], rtol=3e-2, atol=3e-2
            )
            torch.testing.assert_close(
                lse[b, ..., h].cpu(), wanted_lse[b, ..., h], rtol=1e-3, atol=2e-3
            )
        if threshold == 0:
            assert stats.skipped.sum() == 0
        if threshold == 0.5:
            assert stats.skipped.sum() > 0


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("name", ["dense", "causal"])
def test_nothing_skipped_is_the_dense_kernel_bit_by_bit(cuda, one_kernel, name, dim):
    call, given = calls(3000)[name], [x.to(cuda) for x in inputs(3000, dim=dim)]
    zero = torch.zeros(2, device=cuda)
    skipping = call(*given, skip_threshold=zero, return_lse=True)
    for a, b in zip(skipping, call(*given, return_lse=True), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("name", calls(20))
def test_graph_with_another_threshold(cuda, name):
    call, given = calls(1000)[name], [x.to(cuda) for x in inputs(1000)]
    threshold = torch.zeros(2, device=cuda)
    options = dict(skip_threshold=threshold, return_lse=True, return_stats=True)
    if name in ("blocks", "pairs of blocks", "partial blocks", "stripes"):
        pytest.skip("these make their masks on the CPU inside the call")
    call(*given, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, stats = call(*given, **options)
    for values in ((0.0, 0.5), (1e-3, 0.05)):
        threshold.copy_(torch.tensor(values))
        graph.replay()
        wanted, wanted_lse, wanted_stats = call(*given, **options)
        assert out.equal(wanted)
        assert lse.equal(wanted_lse)
        assert stats.skipped.equal(wanted_stats.skipped)
        assert stats.visited.equal(wanted_stats.visited)


def test_values_out_of_range_are_held_to_it(cuda):
    given = [x.to(cuda) for x in inputs(1000, batch=4)]
    odd = torch.tensor([-1.0, float("nan"), 1.0, 7.0], device=cuda)
    held = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24], device=cuda)
    odd, held = (
        sparse_fmha.attention(*given, skip_threshold=t, return_stats=True) for t in (odd, held)
    )
    assert odd[0].equal(held[0])
    assert odd[1].skipped.equal(held[1].skipped)
    assert odd[1].skipped[:2].sum() == 0
    assert odd[1].skipped[2:].sum() > 0


def test_half_of_a_query_box_outside_of_the_grid(cuda):
    """It visits nothing, also where tiles are full. 400 tokens: the last box of 128 has 16."""
    given, options = inputs(400), dict(skip_threshold=0.5, return_stats=True)
    _, stats = sparse_fmha.neighborhood_attention(*(x.to(cuda) for x in given), 150, **options)
    _, wanted = sparse_fmha.neighborhood_attention(*given, 150, **options)
    assert stats.visited.cpu().equal(wanted.visited)
