"""Cases of gradients: each rank's part is that of one process's on the whole sequence."""

import pytest
import torch
from distributed_inputs import block_mask, qkv, stripe_mask
from distributed_ranks import case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import sparse_fmha
import sparse_fmha.distributed as sd


def weights_of(*results):
    """Of a loss that out and lse both take part in; finite also where a lse is not."""
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(x.shape, generator=generator) for x in results]


def loss_of(results, weights):
    terms = zip(results, weights, strict=True)
    return sum((x.masked_fill(x == -torch.inf, 0) * w.to(x.dtype)).sum() for x, w in terms)


def gradients(call, tensors, weights, *args, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = call(*leaves, *args, return_lse=True, **options)
    return torch.autograd.grad(loss_of(results, weights), leaves)


def agree(ranks, call, function, tensors, mask=None, shard=None, whole=None, rtol=1e-4, **options):
    shard = shard or ranks.part
    arguments = () if mask is None else (mask,)
    with torch.no_grad():
        weights = weights_of(*function(*tensors, *arguments, return_lse=True, **(whole or options)))
    expected = gradients(function, tensors, weights, *arguments, **(whole or options))
    parts, own = [[shard(x) for x in xs] for xs in (tensors, weights)]
    found = gradients(call, parts, own, mask=mask, **options)
    for part, one in zip(found, expected, strict=True):
        assert part.dtype == one.dtype
        torch.testing.assert_close(part, shard(one), rtol=rtol, atol=rtol / 10)


@case(2, 4)
def backward_of_ulysses(ranks):
    for heads, heads_kv in ((8, 8), (8, 4), (8, 1)):
        tensors = qkv(heads, heads_kv)
        agree(ranks, sd.ulysses, sparse_fmha.attention, tensors, causal=True)
    agree(ranks, sd.ulysses, sparse_fmha.attention, qkv(length_kv=96))
    mask = block_mask(2, 8, causal=True)
    agree(ranks, sd.ulysses, sparse_fmha.block_sparse_attention, qkv(), mask)
    agree(ranks, sd.ulysses, sparse_fmha.stripe_attention, qkv(), stripe_mask(1, 8))


@case(2, 4)
def backward_of_ulysses_with_extra_tokens(ranks):
    """Of which the gradients are whole on every rank."""
    tensors, options = qkv(length=4 * 8 * 16), {"window": (3, 4, 5)}
    extra = [x[:, :5].contiguous() for x in qkv(heads_kv=4)[1:]]

    def one(q, k, v, extra_k, extra_v, **more):
        grids = (x.unflatten(1, (4, 8, 16)) for x in (q, k, v))
        results = sparse_fmha.neighborhood_attention(
            *grids, extra_k=extra_k, extra_v=extra_v, **options, **more
        )
        return [x.flatten(1, 3) for x in results]

    def several(q, k, v, extra_k, extra_v, **more):
        function = sparse_fmha.neighborhood_attention
        more |= {"extra_k": extra_k, "extra_v": extra_v}
        return sd.ulysses(q, k, v, function, grid=(4, 8, 16), **options, **more)

    with torch.no_grad():
        weights = weights_of(*one(*tensors, *extra, return_lse=True))
    expected = gradients(one, [*tensors, *extra], weights)
    own = [ranks.part(x) for x in weights]
    found = gradients(several, [*(ranks.part(x) for x in tensors), *extra], own)
    for place, (part, whole) in enumerate(zip(found, expected, strict=True)):
        whole = ranks.part(whole) if place < 3 else whole
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


@case(2, 4)
def backward_of_all_gather(ranks):
    function = sparse_fmha.attention
    for zigzag in (False, True):
        options = {"zigzag": zigzag, "shard": sd.zigzag_shard if zigzag else None}
        for heads, heads_kv in ((8, 4), (3, 1)):
            for causal in (False, True):
                agree(
                    ranks, sd.all_gather_kv, function, qkv(heads, heads_kv), causal=causal,
                    whole={"causal": causal}, **options,
                )  # fmt: skip
        # The first queries see nothing, on some ranks all.
        agree(
            ranks, sd.all_gather_kv, function, qkv(batch=1, length_kv=64), causal=True,
            whole={"causal": True}, **options,
        )  # fmt: skip
        mask = block_mask(2, 8, causal=True)
        agree(
            ranks, sd.all_gather_kv, sparse_fmha.block_sparse_attention, qkv(), mask,
            whole={"scale": None}, **options,
        )  # fmt: skip


@case(2)
def backward_adds_up_in_fp32(ranks):
    tensors = qkv(dtype=torch.bfloat16)
    for call in (sd.ulysses, sd.all_gather_kv):
        agree(ranks, call, sparse_fmha.attention, tensors, rtol=3e-2)


@case(2, 4)
def backward_of_dtensors(ranks):
    mesh = init_device_mesh("cpu", (ranks.world,))
    tensors = qkv(batch=4)
    mask = block_mask(4, 8)
    functions = {
        "dense": (lambda q, k, v, mask, **o: sparse_fmha.attention(q, k, v, causal=True, **o)),
        "blocks": sparse_fmha.block_sparse_attention,
    }
    for placement in (Shard(0), Shard(2), Replicate()):
        for function in functions.values():
            with torch.no_grad():
                weights = weights_of(*function(*tensors, mask, return_lse=True))
            expected = gradients(function, tensors, weights, mask)
            spread = [distribute_tensor(x, mesh, [placement]) for x in (*tensors, *weights)]
            leaves = [x.detach().requires_grad_() for x in spread[:3]]
            lists = sd.distribute_mask(mask, mesh, [placement])
            results = function(*leaves, lists, return_lse=True)
            loss = sum((x * w).sum() for x, w in zip(results, spread[3:], strict=True))
            for found, one in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
                assert found.placements == (placement,)
                torch.testing.assert_close(found.full_tensor(), one, rtol=1e-4, atol=1e-5)


@case(2)
def backward_of_what_is_whole_on_every_rank(ranks):
    x = ranks.part(qkv()[0]).requires_grad_()
    with pytest.raises(NotImplementedError, match="x must not require grad: every rank"):
        sd.zigzag_unshard(x)
