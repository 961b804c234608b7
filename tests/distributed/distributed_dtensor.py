"""Cases of the ops on DTensors: values, and where the results are placed."""

import pytest
import torch
from distributed_inputs import LENGTH, block_mask, qkv, skipped_qkv, stripe_mask
from distributed_ranks import case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import StripeMask

BATCH, HEADS = Shard(0), Shard(2)


def mesh_of(ranks):
    return init_device_mesh("cpu", (ranks.world,))


def check(mesh, placements, function, tensors, mask=None, expected=None, messages=0, **options):
    """function of DTensors is that of the whole tensors, and its results are placed like q."""
    whole = function(*tensors, *(() if mask is None else (mask,)), return_lse=True, **options)
    spread = [distribute_tensor(x, mesh, placements) for x in tensors]
    arguments = () if mask is None else (sd.distribute_mask(mask, mesh, placements),)
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            options[name] = distribute_tensor(
                value, mesh, [p if p in (BATCH, HEADS) else Replicate() for p in placements]
            )
    with CommDebugMode() as sent:
        results = function(*spread, *arguments, return_lse=True, **options)
    for result, value in zip(results, whole, strict=True):
        assert result.placements == tuple(expected or placements)
        assert result.shape == value.shape
        torch.testing.assert_close(result.full_tensor(), value, rtol=1e-5, atol=1e-6)
    if messages is not None:
        assert sent.get_total_counts() == messages


@case(2, 4)
def dtensor_dense(ranks):
    tensors = qkv(batch=4)
    for placement in (BATCH, HEADS, Replicate()):
        for causal in (False, True):
            check(mesh_of(ranks), [placement], sparse_fmha.attention, tensors, causal=causal)


@case(2, 4)
def dtensor_neighborhood(ranks):
    grids = [x.unflatten(1, (16, 32)) for x in qkv(batch=4)]
    extra = dict(zip(("extra_k", "extra_v"), (x[:, :3] for x in qkv(batch=4)[1:]), strict=True))
    function, heads = sparse_fmha.neighborhood_attention, Shard(3)
    check(mesh_of(ranks), [BATCH], function, grids, window=(3, 5), **extra)
    check(mesh_of(ranks), [heads], function, grids, window=(3, 5), stride=(2, 1))
    spread = [distribute_tensor(x, mesh_of(ranks), [heads]) for x in grids]
    spread_extra = {
        name: distribute_tensor(x, mesh_of(ranks), [HEADS]) for name, x in extra.items()
    }
    out = function(*spread, window=3, **spread_extra)
    assert out.placements == (heads,)
    torch.testing.assert_close(out.full_tensor(), function(*grids, window=3, **extra))


@case(2, 4)
def dtensor_masks(ranks):
    tensors = qkv(batch=4)
    blocks, stripes = sparse_fmha.block_sparse_attention, sparse_fmha.stripe_attention
    mesh = mesh_of(ranks)
    for placement in (BATCH, HEADS):
        for batch, heads in ((1, 1), (4, 1), (1, 8), (4, 8)):
            check(mesh, [placement], blocks, tensors, block_mask(batch, heads, causal=heads == 8))
        for batch, heads in ((4, 1), (1, 8)):
            check(mesh, [placement], stripes, tensors, stripe_mask(batch, heads, causal=heads == 8))
    check(mesh, [Replicate()], blocks, tensors, block_mask(4, 8))


@case(4)
def dtensor_batch_and_heads(ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensors = qkv(batch=4)
    check(mesh, [BATCH, HEADS], sparse_fmha.attention, tensors, causal=True)
    mask = block_mask(4, 1)
    spread = sd.distribute_mask(mask, mesh, [BATCH, HEADS])
    assert spread.counts.placements == (Shard(0), Replicate())
    assert "lists for 4x1 (batch x heads), with partial blocks, cpu" in repr(spread)
    assert "4x1 (batch x heads), cpu" in repr(
        sd.distribute_mask(
            StripeMask.from_columns(torch.ones(4, 1, 8, 512).bool(), 512, 64), mesh, [BATCH, HEADS]
        )
    )
    check(mesh, [BATCH, HEADS], sparse_fmha.block_sparse_attention, tensors, mask)
    # 2 key heads serve the second dimension of the mesh, and not both.
    check(mesh, [BATCH, HEADS], sparse_fmha.attention, qkv(8, 2, batch=4))


@case(2, 4)
def dtensor_skipping(ranks):
    tensors, options = skipped_qkv(), {"skip_threshold": 0.3}
    for placement in (BATCH, HEADS):
        check(mesh_of(ranks), [placement], sparse_fmha.attention, tensors, **options)
    spread = [distribute_tensor(x, mesh_of(ranks), [HEADS]) for x in tensors]
    _, stats = sparse_fmha.attention(*spread, **options, return_stats=True)
    _, whole = sparse_fmha.attention(*tensors, **options, return_stats=True)
    assert stats.skipped.placements == (Shard(1),)
    assert stats.skipped.full_tensor().equal(whole.skipped)
    assert whole.skipped.sum() > 0
    for placement in (BATCH, HEADS):
        given = [x.clone().requires_grad_() for x in tensors]
        spread = [
            distribute_tensor(x, mesh_of(ranks), [placement]).requires_grad_() for x in tensors
        ]
        found = [
            torch.autograd.grad(sparse_fmha.attention(*x, **options).square().sum(), x)
            for x in (given, spread)
        ]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b.full_tensor(), a, rtol=1e-4, atol=1e-5)


@case(2)
def dtensor_biases_and_sinks(ranks):
    """Values and gradients; what heads share is replicated where heads are sharded."""
    mesh, (q, k, v) = mesh_of(ranks), qkv(batch=4)
    generator = torch.Generator().manual_seed(1)
    sink = torch.randn(8, generator=generator)
    for placement, of_list, of_sink in ((BATCH, 0, Replicate()), (HEADS, 1, Shard(0))):
        for batch, heads in ((4, 8), (4, 1), (1, 8)):
            bias = torch.randn(batch, heads, LENGTH, generator=generator)
            of_bias = Replicate() if bias.shape[of_list] == 1 else Shard(of_list)
            given = [x.clone().requires_grad_() for x in (q, k, v, bias, sink)]
            places = [placement] * 3 + [of_bias, of_sink]
            spread = [
                distribute_tensor(x.detach(), mesh, [place]).requires_grad_()
                for x, place in zip(given, places, strict=True)
            ]
            found = [
                sparse_fmha.attention(*x[:3], causal=True, key_bias=x[3], sink=x[4])
                for x in (given, spread)
            ]
            assert found[1].placements == (placement,)
            torch.testing.assert_close(found[1].full_tensor(), found[0])
            whole = torch.autograd.grad(found[0].square().sum(), given)
            parts = torch.autograd.grad(found[1].square().sum(), spread)
            for a, b in zip(parts, whole, strict=True):
                torch.testing.assert_close(a.full_tensor(), b, rtol=1e-4, atol=1e-5)


@case(2, 4)
def dtensor_key_heads_that_do_not_divide(ranks):
    """Three key heads, also of nine: no rank may have query heads without their key heads."""
    for heads in (6, 9, 12):
        tensors = qkv(heads, 3, batch=1)
        spread = [distribute_tensor(x, mesh_of(ranks), [HEADS]) for x in tensors]
        out = sparse_fmha.attention(*spread)
        assert out.placements == (Replicate(),)
        torch.testing.assert_close(out.full_tensor(), sparse_fmha.attention(*tensors))


@case(2, 4)
def dtensor_heads_that_are_uneven(ranks):
    check(mesh_of(ranks), [HEADS], sparse_fmha.attention, qkv(5, 5, batch=1), causal=True)


@case(2, 4)
def dtensor_sequence_is_redistributed(ranks):
    """The cache of DTensor's decisions does not keep the first call's `causal`."""
    mesh, tensors = mesh_of(ranks), qkv(batch=1)
    for causal in (False, True, False):
        spread = [distribute_tensor(x, mesh, [Shard(1)]) for x in tensors]
        out = sparse_fmha.attention(*spread, causal=causal)
        assert out.placements == (HEADS,)
        torch.testing.assert_close(
            out.full_tensor(), sparse_fmha.attention(*tensors, causal=causal)
        )


@case(2, 4)
def dtensor_mask_errors(ranks):
    mesh, mask = mesh_of(ranks), block_mask()
    with pytest.raises(ValueError, match=r"placement of q must be .*, got S\(1\)"):
        sd.distribute_mask(mask, mesh, [Shard(1)])
    with pytest.raises(
        ValueError, match=r"placements must have one entry for each of the 1 dimensions .*got 2"
    ):
        sd.distribute_mask(mask, mesh, [BATCH, HEADS])
    with pytest.raises(TypeError, match="mask must be a BlockMask or StripeMask, got Tensor"):
        sd.distribute_mask(mask.counts, mesh, [BATCH])


@case(2)
def dtensor_compiled_in_one_graph(ranks):
    tensors = qkv(batch=4)
    spread = [distribute_tensor(x, mesh_of(ranks), [HEADS]) for x in tensors]
    compiled = torch.compile(sparse_fmha.attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(*spread, causal=True)
    assert out.placements == (HEADS,)
    torch.testing.assert_close(out.full_tensor(), sparse_fmha.attention(*tensors, causal=True))
