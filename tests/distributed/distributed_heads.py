"""Cases of heads that differ in work, given out by weight."""

import pytest
import torch
from distributed_additions import check, drawn
from distributed_inputs import LENGTH, block_mask, qkv
from distributed_ranks import case

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import BlockMask

BLOCKS = sparse_fmha.block_sparse_attention


def heavy_tailed():
    """The first half of the heads see everything before them, the others their own block."""
    blocks = torch.eye(8, dtype=torch.bool).expand(1, 8, 8, 8).clone()
    blocks[:, :4] = torch.ones(8, 8).tril().bool()
    return BlockMask.from_blocks(blocks, LENGTH, LENGTH, 64, 64, causal=True)


@case(2, 4)
def heads_balanced_by_weight(ranks):
    mask = heavy_tailed()
    weights, own = sd.head_weights(mask), 8 // ranks.world
    for heads_kv in (8, 4, 1):
        if heads_kv == 4 == ranks.world:
            continue  # each rank has one key head, which leaves nothing to balance
        order = sd.balanced_heads(weights, heads_kv, ranks.world)
        loads = [sum(weights[h] for h in order[i : i + own]) for i in range(0, 8, own)]
        assert max(loads) == min(loads)
        tensors = qkv(8, heads_kv)
        options = {"head_order": order, "slices": 2 if heads_kv != 4 else 1}
        check(sd.ulysses, BLOCKS, tensors, ranks.part, mask, **options)
        check(
            sd.ulysses, BLOCKS, tensors, ranks.part, mask, key_bias=drawn(1, 8, LENGTH),
            sink=torch.linspace(-1, 1, 8), **options,
        )  # fmt: skip
    mine = order[ranks.rank * own : (ranks.rank + 1) * own]
    local = BlockMask.from_blocks(mask.blocks()[:, mine], LENGTH, LENGTH, 64, 64, causal=True)
    out = sd.ulysses(*(ranks.part(x) for x in tensors), mask=local, head_order=order)
    ranks.same(out, BLOCKS(*tensors, mask))


@case(2, 4)
def windows_in_an_order_of_heads(ranks):
    """Extra tokens follow their key heads."""
    order = [*range(4, 8), *range(4)]
    tensors = qkv(8, 8)
    extra = dict(zip(("extra_k", "extra_v"), (x[:, :5] for x in qkv(8, 8)[1:]), strict=True))
    function = sparse_fmha.neighborhood_attention
    out = sd.ulysses(
        *(ranks.part(x) for x in tensors), function, head_order=order, window=33, **extra
    )
    ranks.same(out, function(*tensors, window=33, **extra))


@case(2)
def orders_that_are_none(ranks):
    parts = [ranks.part(x) for x in qkv(8, 4)]
    for order in ([0] * 8, range(7)):
        with pytest.raises(ValueError, match="head_order must have each of the 8 heads once"):
            sd.ulysses(*parts, head_order=order)
    with pytest.raises(ValueError, match="heads of one key head in each 2 places"):
        sd.ulysses(*parts, head_order=[0, 2, 1, 3, 4, 5, 6, 7])
    with pytest.raises(ValueError, match="head_order must be the same on all ranks"):
        sd.ulysses(*parts, head_order=range(8) if ranks.rank else [2, 3, 0, 1, 4, 5, 6, 7])
    with pytest.raises(ValueError, match="heads of q must be a multiple of the 3 ranks"):
        sd.balanced_heads([1.0] * 8, 4, 3)
    with pytest.raises(TypeError, match="mask must be a BlockMask or StripeMask, got int"):
        sd.head_weights(3)
    assert sd.head_weights(block_mask(2, 8)) == [
        float(x) * 32 for x in block_mask(2, 8).blocks().sum((0, 2, 3))
    ]
