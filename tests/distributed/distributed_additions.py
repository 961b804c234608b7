"""Cases of key_bias, row_threshold, sink and skip_threshold, forward and backward."""

import pytest
import torch
from distributed_inputs import LENGTH, block_mask, qkv, stripe_mask
from distributed_ranks import case

import sparse_fmha
import sparse_fmha.distributed as sd

DENSE, BLOCKS = sparse_fmha.attention, sparse_fmha.block_sparse_attention
STRIPES = sparse_fmha.stripe_attention
ZIGZAG = {"causal": True, "zigzag": True}


def drawn(*shape, hidden=0.1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x.masked_fill_(torch.rand(shape, generator=generator) < hidden, -torch.inf)


def gradients(call, tensors, shard=None, **options):
    """out, lse and the gradients of their sum with the same weights on any number of ranks."""
    names = [x for x in ("key_bias", "sink") if x in options]
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *(options[x] for x in names))]
    options |= dict(zip(names, leaves[3:], strict=True))
    out, lse = call(*leaves[:3], return_lse=True, **options)
    weights = torch.linspace(-1, 1, out.shape[-1]), torch.linspace(0.5, 2, lse.shape[-1])
    loss = (out * weights[0]).sum() + (lse.masked_fill(lse.isinf(), 0) * weights[1]).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def check(call, function, tensors, shard, mask=None, whole=None, **options):
    """A rank's parts of results and gradients are those of one process."""
    one = dict(whole or {})
    added = {x: options.pop(x) for x in ("key_bias", "row_threshold", "sink") if x in options}
    if mask is not None:
        one["mask"] = options["mask"] = mask
    expected = gradients(function, tensors, **one, **added)
    own = {x: y if x == "sink" else shard(y, 2) for x, y in added.items()}
    found = gradients(call, [shard(x, 1) for x in tensors], **options, **own)
    dims = [1] * 5 + [2] * ("key_bias" in added) + [None] * ("sink" in added)
    for part, right, dim in zip(found, expected, dims, strict=True):
        right = right if dim is None else shard(right, dim)
        torch.testing.assert_close(part.detach(), right.detach(), rtol=1e-4, atol=1e-5)


@case(2, 4)
def biases_and_sinks(ranks):
    sink = torch.linspace(-1, 2, 8)
    for call, layout, options in (
        (sd.ulysses, None, {}),
        (sd.ulysses, None, {"slices": 2}),
        (sd.all_gather_kv, None, {"slices": 2}),
        (sd.all_gather_kv, "zigzag", ZIGZAG),
        (sd.pass_kv, "zigzag", {}),
    ):
        shards = None if layout is None else sd.Shards.zigzag(LENGTH, ranks.world)
        if call is sd.pass_kv:
            options = options | {"shards": shards}

        def shard(x, dim, shards=shards):
            return ranks.part(x, dim) if shards is None else sd.shard(x, shards, dim)

        for bias in (drawn(2, 1, LENGTH), drawn(1, 8, LENGTH)):
            check(
                call, DENSE, qkv(), shard, whole={"causal": True}, sink=sink, key_bias=bias,
                **options | {"causal": True},
            )  # fmt: skip


@case(2, 4)
def biases_of_lists_and_thresholds_of_rows(ranks):
    bias, rows = drawn(1, 8, LENGTH), drawn(2, 1, LENGTH, seed=6) - 0.5
    sink = torch.zeros(8)
    for call, options in (
        (sd.ulysses, {"slices": 2}),
        (sd.all_gather_kv, {"zigzag": True}),
        (sd.pass_kv, {}),
    ):
        shard = ranks.part
        if options.get("zigzag"):
            shard = sd.zigzag_shard
        for function, mask in ((BLOCKS, block_mask(2, 8, causal=True)), (STRIPES, stripe_mask())):
            check(
                call, function, qkv(), shard, mask, key_bias=bias, row_threshold=rows, sink=sink,
                **options,
            )  # fmt: skip


@case(2, 4)
def biases_of_uneven_lengths(ranks):
    """Also of a rank without keys."""
    lengths = [0, 70, 31, 0][: ranks.world]
    lengths[0] += 101 - sum(lengths)
    uneven = sd.Shards.of_lengths(lengths)

    def shard(x, dim):
        return sd.shard(x, uneven, dim)

    tensors, bias = qkv(8, 1, length=101), drawn(2, 1, 101)
    for call, options in ((sd.ulysses, {}), (sd.ulysses, {"slices": 2}), (sd.pass_kv, {})):
        check(call, DENSE, tensors, shard, key_bias=bias, sink=torch.ones(8), **options)


@case(2, 4)
def biases_of_windows(ranks):
    """On a grid, in Ulysses."""
    tensors, options = qkv(), {"window": (5, 9)}

    def one(q, k, v, return_lse, **more):
        grids = (x.unflatten(1, (16, 32)) for x in (q, k, v))
        results = sparse_fmha.neighborhood_attention(*grids, **more, return_lse=True)
        return [x.flatten(1, 2) for x in results]

    check(
        sd.ulysses, one, tensors, ranks.part, whole=options, key_bias=drawn(2, 1, LENGTH),
        attention=sparse_fmha.neighborhood_attention, grid=(16, 32), **options,
    )  # fmt: skip


@case(2)
def skipping_in_steps(ranks):
    """A step knows only its own keys' maxima, as a call with these keys alone does."""
    q, k, v = qkv(batch=4)
    q[..., 0], k[..., 0] = 4, 3 * (torch.arange(LENGTH) // 64)[:, None]  # each tile outweighs
    parts, options = [ranks.part(x) for x in (q, k, v)], {"skip_threshold": 0.9}
    pieces = zip(k.chunk(ranks.world, 1), v.chunk(ranks.world, 1), strict=True)
    outs, lses = zip(*(DENSE(q, *x, return_lse=True, **options) for x in pieces), strict=True)
    expected, exact = sparse_fmha.merge(outs, lses)[0], DENSE(q, k, v)
    assert (expected - exact).abs().max() > 0.01
    for value in (0.9, torch.full((4,), 0.9)):
        ranks.same(sd.pass_kv(*parts, skip_threshold=value), expected)
    ranks.same(sd.pass_kv(*parts, skip_threshold=torch.zeros(4)), exact)
    leaf = parts[0].clone().requires_grad_()
    out = sd.pass_kv(leaf, *parts[1:], **options)
    with pytest.raises(NotImplementedError, match="no backward pass yet where it may skip"):
        out.sum().backward()


@case(2)
def additions_that_do_not_fit(ranks):
    parts = [ranks.part(x) for x in qkv()]
    own = ranks.part(drawn(1, 1, LENGTH), 2)
    for call in (sd.ulysses, sd.all_gather_kv, sd.pass_kv):
        with pytest.raises(ValueError, match="key_bias's batch must be the same on all ranks"):
            call(*parts, key_bias=own if ranks.rank else None)
        with pytest.raises(ValueError, match="sink's heads must be the same on all ranks"):
            call(*parts, sink=torch.zeros(8) if ranks.rank else None)
        with pytest.raises(ValueError, match=r"key_bias must have shape .* 256\]"):
            call(*parts, key_bias=drawn(1, 1, LENGTH))
        with pytest.raises(ValueError, match=r"sink must have shape \[8\]"):
            call(*parts, sink=torch.zeros(4))
    with pytest.raises(ValueError, match="key_bias must be given with row_threshold"):
        sd.pass_kv(*parts, block_mask(), row_threshold=own)
    with pytest.raises(ValueError, match="mask must be given with row_threshold"):
        sd.pass_kv(*parts, row_threshold=own, key_bias=own)
