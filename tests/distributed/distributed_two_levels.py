"""Cases of `two_levels`, and of shards balanced by the weights of a mask."""

import pytest
import torch
from distributed_additions import check as compare
from distributed_backward import agree
from distributed_inputs import LENGTH, agrees, block_mask, qkv, stripe_mask
from distributed_ranks import case
from torch.distributed.device_mesh import init_device_mesh

import sparse_fmha
import sparse_fmha.distributed as sd


def check(mesh, tensors, mask=None, hosts=None, **options):
    hosts = hosts or sd.Shards.even(LENGTH, mesh.size(0))
    every = hosts.split(mesh.size(1))
    function = sparse_fmha.attention
    if mask is not None:
        blocks = isinstance(mask, sparse_fmha.BlockMask)
        function = sparse_fmha.block_sparse_attention if blocks else sparse_fmha.stripe_attention
    whole = {} if mask is not None else {"causal": options.get("causal", False)}
    common = {"shard": lambda x, dim=1: sd.shard(x, every, dim), "mesh": mesh, "shards": hosts}
    common |= options
    agrees(None, sd.two_levels, function, tensors, mask, whole=dict(whole), **common)
    agree(None, sd.two_levels, function, tensors, mask, whole=whole or {"scale": None}, **common)


@case(4)
def two_levels_of_ranks(ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("hosts", "ranks"))
    check(mesh, qkv(8, 1))  # fewer key heads than ranks
    check(mesh, qkv(), causal=True, hosts=sd.Shards.zigzag(LENGTH, 2))
    check(mesh, qkv(), block_mask(2, 8, causal=True), sd.Shards.zigzag(LENGTH, 2, 64))
    check(mesh, qkv(), stripe_mask(1, 1), slices=2)
    order = [4, 5, 2, 3, 0, 1, 6, 7]
    check(mesh, qkv(), block_mask(2, 8), slices=2, head_order=order)
    plan = sd.plan_kv(block_mask(1, 4), group=mesh.get_group(0))
    with pytest.raises(ValueError, match="a plan of lists for 1 head or the 2 of this call, got 4"):
        sd.two_levels(*(ranks.part(x) for x in qkv()), plan, mesh=mesh, slices=2)
    mask = block_mask(1, 1)
    plan = sd.plan_kv(mask, group=mesh.get_group(0))
    out = sd.two_levels(*(ranks.part(x) for x in qkv()), plan, mesh=mesh)
    ranks.same(out, sparse_fmha.block_sparse_attention(*qkv(), mask))


@case(4)
def two_levels_of_uneven_ranks(ranks):
    """Of 101 tokens, also with a bias, a sink and heads in another order."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("hosts", "ranks"))
    hosts = sd.Shards.zigzag(101, 2)
    tensors, every = qkv(8, 4, length=101), hosts.split(2)
    options = {"causal": True, "sink": torch.linspace(-1, 1, 8)}
    bias = torch.linspace(-1, 1, 8 * 101).view(1, 8, 101)
    compare(
        sd.two_levels, sparse_fmha.attention, tensors, lambda x, dim: sd.shard(x, every, dim),
        whole={"causal": True}, mesh=mesh, shards=hosts, head_order=[4, 5, 2, 3, 0, 1, 6, 7],
        key_bias=bias, **options,
    )  # fmt: skip


@case(8)
def eight_ranks(ranks):
    """Hosts of 4 and of 2; fewer key heads than ranks; windows; both other functions."""
    tensors = qkv(8, 2, batch=1)
    for hosts in (2, 4):
        mesh = init_device_mesh("cpu", (hosts, 8 // hosts), mesh_dim_names=("hosts", "ranks"))
        check(mesh, tensors, causal=True, hosts=sd.Shards.zigzag(LENGTH, hosts))
    function = sparse_fmha.attention
    agree(ranks, sd.ulysses, function, tensors, causal=True)
    options = {"zigzag": True, "causal": True, "slices": 2}
    agree(
        ranks, sd.all_gather_kv, function, tensors, shard=sd.zigzag_shard, whole={"causal": True},
        **options,
    )  # fmt: skip
    windows = sparse_fmha.neighborhood_attention
    agrees(ranks, sd.ulysses, windows, tensors, whole={"window": 33}, attention=windows, window=33)


@case(2)
def two_levels_need_a_mesh(ranks):
    parts = [ranks.part(x) for x in qkv()]
    with pytest.raises(ValueError, match="mesh must have two dimensions, hosts and ranks, got 1"):
        sd.two_levels(*parts, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got NoneType"):
        sd.two_levels(*parts, mesh=None)


@case(2, 4)
def balanced_by_the_weights_of_a_mask(ranks):
    """Anchors: some rows see everything, others a window."""
    blocks = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    blocks[..., 5, :] = blocks[..., 4, :] = True
    blocks |= torch.eye(8, dtype=torch.bool)
    mask = sparse_fmha.BlockMask.from_blocks(blocks, LENGTH, LENGTH, 64, 64)
    weights = sd.row_weights(mask)
    shards = sd.Shards.balanced(weights, LENGTH, ranks.world, unit=64)
    loads, even = (x.weights(weights, 64) for x in (shards, sd.Shards.even(LENGTH, ranks.world)))
    assert max(loads) < 0.7 * max(even)
    agrees(
        ranks, sd.pass_kv, sparse_fmha.block_sparse_attention, qkv(), mask, whole={},
        shard=lambda x: sd.shard(x, shards), shards=shards,
    )  # fmt: skip


@case(2, 4)
def sharding_and_back(ranks):
    shards = sd.Shards.of_lengths([3, *[0] * (ranks.world - 2), 7])
    x = torch.arange(20).view(2, 10)
    assert sd.unshard(sd.shard(x, shards), shards).equal(x)
    assert sd.unshard(sd.shard(x.t(), shards, 0), shards, 0).equal(x.t())
    with pytest.raises(ValueError, match="x must have the 10 tokens of the shards in dimension 0"):
        sd.shard(x, shards, 0)
    with pytest.raises(ValueError, match=r"x must have the \d tokens of this rank"):
        sd.unshard(x, shards)
    with pytest.raises(TypeError, match="shards must be Shards, got int"):
        sd.shard(x, 2)
