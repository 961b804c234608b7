"""Cases of `pass_kv`: keys in steps, any lengths, and only the keys that lists need."""

import pytest
import torch
from block_masks import Drawn
from distributed_backward import agree
from distributed_inputs import LENGTH, agrees, block_mask, qkv, stripe_mask
from distributed_ranks import case

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import StripeMask

DENSE = sparse_fmha.attention
BLOCKS, STRIPES = sparse_fmha.block_sparse_attention, sparse_fmha.stripe_attention


def of(shards):
    return lambda x, dim=1: sd.shard(x, shards, dim)


def both(ranks, function, tensors, mask=None, shards=None, **options):
    """Results and gradients are those of one process."""
    whole = {} if mask is not None else {"causal": options.get("causal", False)}
    common = {"shard": of(shards) if shards else None, "shards": shards} | options
    agrees(ranks, sd.pass_kv, function, tensors, mask, whole=dict(whole), **common)
    agree(ranks, sd.pass_kv, function, tensors, mask, whole=whole or {"scale": None}, **common)


@case(2, 4)
def pass_kv_dense_and_causal(ranks):
    for heads, heads_kv, causal in ((8, 1, False), (3, 1, True), (8, 4, True)):
        tensors = qkv(heads, heads_kv)
        both(ranks, DENSE, tensors, causal=causal, steps=None if causal else 1)
    both(ranks, DENSE, qkv(), causal=True, shards=sd.Shards.zigzag(LENGTH, ranks.world))


@case(2, 4)
def pass_kv_uneven_and_empty(ranks):
    """Fewer and more keys than queries; a rank without queries, and one without keys."""
    for length, length_kv in ((101, 101), (101, 64), (96, 203)):
        tensors = qkv(4, 2, length=length, length_kv=length_kv)
        for causal in (False, True):
            own = [length - 3, 0, 3, 0][: ranks.world]
            own[1] += length - sum(own)
            keys = [0, length_kv - 5, 0, 5][: ranks.world]
            keys[0] += length_kv - sum(keys)
            shards, key_shards = (sd.Shards.of_lengths(x) for x in (own, keys))
            of_each = shards, key_shards, key_shards
            parts = [sd.shard(x, s).requires_grad_() for x, s in zip(tensors, of_each, strict=True)]
            leaves = [x.clone().requires_grad_() for x in tensors]
            expected = DENSE(*leaves, causal=causal)
            weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
            out = sd.pass_kv(*parts, causal=causal)
            right = sd.shard(expected.detach(), shards)
            torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
            right = torch.autograd.grad((expected * weights).sum(), leaves)
            found = torch.autograd.grad((out * sd.shard(weights, shards)).sum(), parts)
            for one, other, s in zip(found, right, of_each, strict=True):
                torch.testing.assert_close(one, sd.shard(other, s), rtol=1e-4, atol=1e-5)


@case(2, 4)
def pass_kv_of_one_step_changes_no_bit(ranks):
    """Only the last rank has keys, so nothing is merged."""
    q, k, v = (x.bfloat16() for x in qkv())
    keys = sd.Shards.of_lengths([0] * (ranks.world - 1) + [LENGTH])
    k, v = (sd.shard(x, keys) for x in (k, v))
    out = sd.pass_kv(ranks.part(q), k, v)
    assert out.equal(ranks.part(DENSE(*(x.bfloat16() for x in qkv()))))


@case(2, 4)
def pass_kv_dtypes(ranks):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        eps = max(torch.finfo(dtype).eps, 1e-7)
        agrees(
            ranks, sd.pass_kv, DENSE, qkv(dtype=dtype), tolerance=(4 * eps, 4 * eps), causal=True
        )
    agree(ranks, sd.pass_kv, DENSE, qkv(dtype=torch.bfloat16), rtol=3e-2)


@case(2, 4)
def pass_kv_masks(ranks):
    for causal in (False, True):
        for shards in (None, sd.Shards.zigzag(LENGTH, ranks.world, 64)):
            both(ranks, BLOCKS, qkv(), block_mask(2, 8, causal=causal), shards)
            both(ranks, STRIPES, qkv(), stripe_mask(1, 8, causal=causal), shards)
    both(ranks, BLOCKS, qkv(), block_mask(1, 1), steps=1)


@case(2, 4)
def pass_kv_masks_of_uneven_lengths(ranks):
    """Ragged last blocks, ranks without tokens, other numbers of keys; runs that ranks share."""
    length, length_kv = 5 * 64 + 7, 200
    mask = Drawn(length, length_kv, 64, 32, batch=1, heads=8, causal=False, seed=1).mask()
    keys = sd.Shards.even(length_kv, ranks.world, 32)
    shards = sd.Shards.of_lengths([64, *[0] * (ranks.world - 2), length - 64])
    q, k, v = qkv(length=length, length_kv=length_kv)
    parts = sd.shard(q, shards), sd.shard(k, keys), sd.shard(v, keys)
    out = sd.pass_kv(*parts, mask, shards=shards, key_shards=keys)
    expected = BLOCKS(q, k, v, mask)
    torch.testing.assert_close(out, sd.shard(expected, shards), rtol=1e-5, atol=1e-6)

    # Runs of 64 keys from any place, and past the last key.
    starts = torch.tensor([100, 33, 180]).int().expand(1, 1, 6, 3).contiguous()
    runs = torch.tensor([2, 1, 3, 0, 2, 3]).int().view(1, 1, 6)
    columns = torch.arange(3).int().expand(1, 1, 6, 3).contiguous()
    stripes = StripeMask(
        columns, runs, length, length_kv, 64, starts, runs, validate=True
    )  # fmt: skip
    keys = sd.Shards.even(length_kv, ranks.world)
    parts = sd.shard(q, shards), sd.shard(k, keys), sd.shard(v, keys)
    out = sd.pass_kv(*parts, stripes, shards=shards, key_shards=keys)
    expected = STRIPES(q, k, v, stripes)
    torch.testing.assert_close(out, sd.shard(expected, shards), rtol=1e-5, atol=1e-6)


@case(2, 4)
def pass_kv_fetches_only_listed_keys(ranks):
    """Rows that list one block of other ranks get this block; a plan serves several calls."""
    blocks = torch.eye(8, dtype=torch.bool)[None, None].clone()
    blocks[..., -1, 0] = True
    mask = sparse_fmha.BlockMask.from_blocks(blocks, LENGTH, LENGTH, 64, 64)
    plan = sd.plan_kv(mask)
    last = ranks.rank == ranks.world - 1
    assert sum(map(sum, plan.received)) == (64 if last else 0)
    assert len(plan.received) == 1  # no other step has keys
    parts = [ranks.part(x) for x in qkv()]
    for _ in range(2):
        ranks.same(sd.pass_kv(*parts, plan), BLOCKS(*qkv(), mask))
    with pytest.raises(ValueError, match="must not be given with a plan"):
        sd.pass_kv(*parts, plan, steps=1)


@case(8)
def pass_kv_on_eight_ranks(ranks):
    shards = sd.Shards.zigzag(203, 8)
    both(ranks, DENSE, qkv(4, 2, batch=1, length=203), causal=True, shards=shards, steps=3)
    shards = sd.Shards.zigzag(LENGTH, 8, 64)  # half of the ranks have one block, none two
    both(ranks, BLOCKS, qkv(batch=1), block_mask(1, 8, causal=True), shards)


@case(2)
def pass_kv_errors(ranks):
    parts = [ranks.part(x) for x in qkv()]
    with pytest.raises(ValueError, match="q must have the 500 tokens of its shard on rank 0"):
        sd.pass_kv(*parts, shards=sd.Shards.of_lengths([500, 12]))
    with pytest.raises(ValueError, match="shards must be for the 2 ranks of the group, got 3"):
        sd.pass_kv(*parts, shards=sd.Shards.even(LENGTH, 3))
    with pytest.raises(ValueError, match="shards must be the same on all ranks"):
        sd.pass_kv(*parts, shards=sd.Shards.even(LENGTH, 2) if ranks.rank else None)
    with pytest.raises(ValueError, match="causal must not be given with a mask"):
        sd.pass_kv(*parts, block_mask(), causal=True)
    with pytest.raises(ValueError, match="multiples of the mask's block_q = 64, got"):
        sd.plan_kv(block_mask(), sd.Shards.of_lengths([100, LENGTH - 100]))
    with pytest.raises(NotImplementedError, match="must be the shards of the queries"):
        sd.plan_kv(block_mask(causal=True, length_kv=320))
    with pytest.raises(TypeError, match="mask must be a BlockMask, a StripeMask or a KeyPlan"):
        sd.pass_kv(*parts, torch.ones(2))
    with pytest.raises(NotImplementedError, match="k must not carry a tangent"):
        torch.func.jvp(lambda k: sd.pass_kv(parts[0], k, parts[2]), (parts[1],), (parts[1],))


@case(2)
def pass_kv_of_uneven_shards_without_comparison(ranks):
    shards = sd.Shards.of_lengths([500, 12])
    parts = [sd.shard(x, shards) for x in qkv()]
    out = sd.pass_kv(*parts, shards=shards, validate=False, causal=True)
    torch.testing.assert_close(out, sd.shard(DENSE(*qkv(), causal=True), shards))
    with pytest.raises(ValueError, match=r"q must have the \d+ tokens of its shard on rank \d"):
        sd.pass_kv(*(x[:, 1:] for x in parts), shards=shards, validate=False)
    with pytest.raises(ValueError, match=r"k must have the \d+ tokens of its shard on rank \d"):
        sd.pass_kv(
            parts[0], *(x[:, 1:] for x in parts[1:]), shards=shards, key_shards=shards,
            validate=False,
        )  # fmt: skip
