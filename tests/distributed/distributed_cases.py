"""Cases of both sequence parallel functions."""

import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_inputs import LENGTH, block_mask, qkv, top_blocks
from distributed_ranks import case
from torch.distributed.device_mesh import init_device_mesh

import sparse_fmha
import sparse_fmha.distributed as sd


@case(2, 4)
def masks_made_from_scores(ranks):
    for heads_kv in (8, 4):
        q, k, v = qkv(heads_kv=heads_kv)
        mask = top_blocks(q, k)
        assert 0 < mask.block_density < 0.5
        expected = sparse_fmha.block_sparse_attention(q, k, v, mask)
        parts = [ranks.part(x) for x in (q, k, v)]
        ranks.same(sd.ulysses(*parts, mask=top_blocks), expected)
        ranks.same(sd.all_gather_kv(*parts, mask=top_blocks, causal=True), expected)
        parts = [sd.zigzag_shard(x) for x in (q, k, v)]
        out = sd.all_gather_kv(*parts, mask=top_blocks, causal=True, zigzag=True)
        torch.testing.assert_close(out, sd.zigzag_shard(expected))


@case(2)
def autocast(ranks):
    parts = [ranks.part(x) for x in qkv()]
    for call in (sd.ulysses, sd.all_gather_kv):
        with torch.autocast("cpu", torch.bfloat16):
            out = call(*parts)
            expected = sparse_fmha.attention(*qkv())
        assert out.dtype == torch.bfloat16
        ranks.same(out, expected, rtol=2e-2, atol=2e-2)


@case(2)
def no_tokens(ranks):
    parts = [x[:, :0] for x in qkv()]
    for call, options in (
        (sd.ulysses, {}),
        (sd.all_gather_kv, {}),
        (sd.all_gather_kv, {"causal": True, "zigzag": True}),
    ):
        out, lse = call(*parts, return_lse=True, **options)
        assert (out.shape, lse.shape) == ((2, 0, 8, 16), (2, 0, 8))


@case(4)
def three_ranks(ranks):
    """A number that divides neither tokens nor heads, but for ulysses."""
    group = dist.new_group([0, 1, 2])
    if ranks.rank == 3:
        return
    for heads, heads_kv, length in ((6, 3, 301), (6, 1, 97)):
        tensors = qkv(heads, heads_kv, length=length)
        expected = sparse_fmha.attention(*tensors, causal=True)
        for call, layout in (
            (sd.ulysses, sd.Shards.even(length, 3)),
            (sd.pass_kv, sd.Shards.zigzag(length, 3)),
        ):
            options = {"shards": layout} if call is sd.pass_kv else {"slices": 2}
            parts = [sd.shard(x, layout, group=group) for x in tensors]
            out = call(*parts, causal=True, group=group, **options)
            torch.testing.assert_close(out, sd.shard(expected, layout, group=group))


@case(4)
def meshes_and_groups(ranks):
    """The sequence over one dimension of a mesh, other sequences over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    q, k, v = (x[mesh.get_local_rank("dp")][None] for x in qkv())
    expected = sparse_fmha.attention(q, k, v, causal=True)
    here = mesh.get_local_rank("cp")
    for group in (mesh["cp"], mesh.get_group("cp")):
        parts = [x.chunk(2, 1)[here] for x in (q, k, v)]
        for call in (sd.ulysses, sd.all_gather_kv, sd.pass_kv):
            out = call(*parts, causal=True, group=group)
            torch.testing.assert_close(out, expected.chunk(2, 1)[here])
        parts = [sd.zigzag_shard(x, group=group) for x in (q, k, v)]
        out = sd.all_gather_kv(*parts, causal=True, zigzag=True, group=group)
        torch.testing.assert_close(sd.zigzag_unshard(out, group=group), expected)


@case(2, 4)
def bytes_sent(ranks):
    """What docs/distributed.md says each rank sends to the others."""
    sent = 0
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    all_to_all, all_gather = dist.all_to_all_single, getattr(dist, gather)

    def counting_all_to_all(output, tensor, **kwargs):
        nonlocal sent
        sent += tensor.nbytes * (ranks.world - 1) // ranks.world
        return all_to_all(output, tensor, **kwargs)

    def counting_all_gather(output, tensor, **kwargs):
        nonlocal sent
        sent += tensor.nbytes * (ranks.world - 1)
        return all_gather(output, tensor, **kwargs)

    share = LENGTH * 16 * 4 // ranks.world  # bytes of a head on a rank
    others = ranks.world - 1
    with (
        mock.patch.object(dist, "all_to_all_single", counting_all_to_all),
        mock.patch.object(dist, gather, counting_all_gather),
    ):
        for heads_kv in (8, 4, 1):
            parts = [ranks.part(x) for x in qkv(heads_kv=heads_kv, batch=1)]
            sent = 0
            sd.ulysses(*parts, validate=False)
            moved = 2 * 8 + 2 * max(heads_kv, ranks.world)
            assert sent == share * moved * others // ranks.world
            sent = 0
            sd.all_gather_kv(*parts, validate=False)
            assert sent == share * 2 * heads_kv * others


@case(2)
def compiled_in_one_graph(ranks):
    parts = [ranks.part(x) for x in qkv()]
    added = {"key_bias": ranks.part(torch.zeros(1, 1, LENGTH), 2), "sink": torch.zeros(8)}
    mesh = init_device_mesh("cpu", (2, 1))
    for call, options in (
        (sd.ulysses, {"causal": True, "head_order": [4, 5, 6, 7, 0, 1, 2, 3]} | added),
        (sd.all_gather_kv, {"causal": True, "zigzag": True} | added),
        (sd.two_levels, {"causal": True, "mesh": mesh}),
    ):
        run = functools.partial(call, validate=False, return_lse=True, **options)
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        with torch.no_grad():
            for one, other in zip(compiled(*parts), run(*parts), strict=True):
                torch.testing.assert_close(one, other)


@case(2)
def pass_kv_compiled_in_one_graph(ranks):
    """Both passes; with a plan, uneven shards, or a bias."""
    parts = [ranks.part(x) for x in qkv()]
    uneven = sd.Shards.of_lengths([200, LENGTH - 200])
    bias, sink = torch.linspace(-1, 1, LENGTH).expand(1, 1, -1), torch.zeros(8)
    own = [sd.shard(x, uneven) for x in qkv()]
    for tensors, options in (
        (parts, {"causal": True, "key_bias": ranks.part(bias, 2), "sink": sink}),
        (own, {"shards": uneven, "causal": True}),
        (parts, {"mask": sd.plan_kv(block_mask(2, 8, causal=True))}),
    ):
        found = []
        run = functools.partial(sd.pass_kv, validate=False, return_lse=True, **options)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
        for call in (run, compiled):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out, lse = call(*leaves)
            gradients = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves)
            found.append([out, lse, *gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
    compiled = torch.compile(sd.pass_kv, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"mask must be a KeyPlan inside torch\.compile"):
        compiled(*parts, block_mask(), validate=False)


@case(2)
def pass_kv_ops_are_what_they_say(ranks):
    q, k, v = (ranks.part(x) for x in qkv(batch=1))
    own = torch.stack([k, v], 2).movedim(1, 0)
    bias = ranks.part(torch.zeros(1, 1, LENGTH), 2)
    leaves = [x.requires_grad_() for x in (q, own, bias)]
    way = (*leaves, None, None, "", [], [], 0, True, None, dist.group.WORLD.group_name)
    torch.library.opcheck(torch.ops.sparse_fmha.pass_kv_fwd.default, way)
