"""Cases of calls that are errors, the same on every rank."""

import pytest
import torch
import torch.distributed as dist
from distributed_inputs import LENGTH, block_mask, qkv, top_blocks
from distributed_ranks import case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import sparse_fmha
import sparse_fmha.distributed as sd

BOTH = (sd.ulysses, sd.all_gather_kv)


def parts(ranks, **kw):
    return [ranks.part(x) for x in qkv(**kw)]


@case(2, 4)
def heads_that_do_not_divide(ranks):
    with pytest.raises(
        ValueError, match=f"heads of q must be a multiple of the {ranks.world} ranks.*got 5"
    ):
        sd.ulysses(*parts(ranks, heads=5, heads_kv=5))
    with pytest.raises(
        ValueError, match=r"heads of k and v must be a multiple or a divisor.*got 3"
    ):
        sd.ulysses(*parts(ranks, heads=12, heads_kv=3))


@case(2, 4)
def ranks_that_differ(ranks):
    """An uneven sequence; every rank says which one differs."""
    q, k, v = parts(ranks)
    if ranks.rank == 1:
        q = q[:, :-1]
    with pytest.raises(ValueError, match=r"q's tokens must be the same.*on rank 1; pad"):
        sd.all_gather_kv(q, k, v, zigzag=True)
    half = qkv(dtype=torch.float16 if ranks.rank else torch.bfloat16)
    for call in BOTH:
        with pytest.raises(ValueError, match=r"q's dtype must be the same.*on rank 1"):
            call(*half)
    with pytest.raises(
        ValueError, match=r"causal must be the same on all ranks, got 0 on rank 0 and 1 on rank 1"
    ):
        sd.all_gather_kv(*parts(ranks), causal=bool(ranks.rank))
    mask = block_mask() if ranks.rank else None
    for call in BOTH:
        with pytest.raises(ValueError, match=r"kind of mask must be the same"):
            call(*parts(ranks), mask=mask)


@case(2, 4)
def groups_that_are_none(ranks):
    tensors = parts(ranks)
    first = dist.new_group([0])
    two = init_device_mesh("cpu", (1, ranks.world), mesh_dim_names=("dp", "cp"))
    for call in BOTH:
        if ranks.rank:
            with pytest.raises(ValueError, match="group must contain this process"):
                call(*tensors, group=first)
        with pytest.raises(ValueError, match=r"2 dimensions.*dp.*cp"):
            call(*tensors, group=two)
        with pytest.raises(TypeError, match=r"group must be a ProcessGroup.*got str"):
            call(*tensors, group="cp")
    if ranks.rank:
        with pytest.raises(ValueError, match="group must contain this process"):
            sd.zigzag_shard(tensors[0], group=first)


@case(2)
def gathering_has_no_derivative(ranks):
    x = parts(ranks)[0]
    with pytest.raises(NotImplementedError, match="x must not require grad"):
        sd.zigzag_unshard(x.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="x must not carry a tangent"):
        torch.func.jvp(sd.zigzag_unshard, (x,), (x,))
    with torch.no_grad():
        assert not sd.zigzag_unshard(x.clone().requires_grad_()).requires_grad


@case(2, 4)
def tensors_of_another_kind(ranks):
    q, k, v = parts(ranks)
    mesh = init_device_mesh("cpu", (ranks.world,))
    spread = distribute_tensor(q, mesh, [Shard(1)])
    for call in BOTH:
        with pytest.raises(TypeError, match=r"q must be this rank's part.*to_local.*got DTensor"):
            call(spread, k, v)
        with pytest.raises(TypeError, match="v must be a tensor, got int"):
            call(q, k, 3)
        with pytest.raises(ValueError, match=r"k must have shape .*tokens of this rank"):
            call(q, k[0], v)
        with pytest.raises(ValueError, match="v must have k's shape"):
            call(q, k, v[:, :, :1])
        with torch.no_grad():
            assert call(q.clone().requires_grad_(), k, v).shape == q.shape
        with pytest.raises(NotImplementedError, match="k must not carry a tangent"):
            torch.func.jvp(lambda k, call=call: call(q, k, v), (k,), (k,))
        with pytest.raises(ValueError, match="return_stats"):
            call(q, k, v, return_stats=True)


@case(2, 4)
def masks_that_do_not_fit(ranks):
    tensors = parts(ranks)
    short = sparse_fmha.BlockMask.from_blocks(
        torch.ones(1, 1, 2, 2, dtype=torch.bool), 128, 128, 64, 64
    )
    for call in BOTH:
        with pytest.raises(
            ValueError, match=f"mask must be for the {LENGTH} tokens of q .*got one for 128"
        ):
            call(*tensors, mask=short)
        with pytest.raises(
            TypeError, match="mask must be a BlockMask, a StripeMask or a function of q and k"
        ):
            call(*tensors, mask=torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"mask must have lists for .*, got 3"):
            call(*tensors, mask=block_mask(heads=3))
        with pytest.raises(TypeError, match=r"mask\(q, k\) must return .*, got Tensor"):
            call(*tensors, mask=lambda q, k: q)
    with pytest.raises(ValueError, match="causal must not be given with a mask"):
        sd.all_gather_kv(*tensors, mask=block_mask(causal=True), causal=True)
    with pytest.raises(ValueError, match=r"a mask with causal = False, .*, got True"):
        sd.all_gather_kv(*tensors, mask=top_blocks)


@case(4)
def masks_whose_blocks_are_cut(ranks):
    mask = block_mask(block_q=128)
    tensors = parts(ranks)
    out = sd.all_gather_kv(*tensors, mask=mask)
    ranks.same(out, sparse_fmha.block_sparse_attention(*qkv(), mask))
    with pytest.raises(ValueError, match="block_q = 128, got 64; pad"):
        sd.all_gather_kv(*tensors, mask=mask, zigzag=True)


@case(2, 4)
def neighborhoods(ranks):
    tensors = parts(ranks)
    function = sparse_fmha.neighborhood_attention
    with pytest.raises(ValueError, match=r"neighborhood_attention.*use ulysses"):
        sd.all_gather_kv(*tensors, function, window=5)
    with pytest.raises(ValueError, match=r"grid must have .*, got 16 in \[4, 4\]"):
        sd.ulysses(*tensors, function, grid=(4, 4), window=3)


@case(2, 4)
def zigzag_lengths(ranks):
    with pytest.raises(ValueError, match=f"multiple of 2 \\* world = {2 * ranks.world}"):
        sd.zigzag_shard(torch.arange(2 * ranks.world + 1), 0)
    with pytest.raises(ValueError, match=r"must have an even number of tokens on each rank.*got 3"):
        sd.zigzag_unshard(torch.arange(3), 0)
    odd = [x[:, :7] for x in qkv()]
    with pytest.raises(ValueError, match=r"q must have an even number of tokens.*got 7"):
        sd.all_gather_kv(*odd, zigzag=True, causal=True)
