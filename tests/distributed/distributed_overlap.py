"""Cases of communication under compute: equal bit by bit to one piece."""

import pytest
import torch
from distributed_backward import agree
from distributed_inputs import block_mask, qkv, stripe_mask, top_blocks
from distributed_ranks import case

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import patterns


@case(2, 4)
def slices_change_no_bit(ranks):
    """Forward and backward; with fewer key heads than ranks too."""
    window = {"attention": sparse_fmha.neighborhood_attention, "grid": (16, 32), "window": (5, 9)}
    zigzag = {"causal": True, "zigzag": True}
    cases = [
        (sd.ulysses, 8, 4, {"causal": True}, (2, 8 // ranks.world)),
        (sd.ulysses, 8, 1, {}, (2,)),
        (sd.ulysses, 8, 8, {"mask": block_mask(2, 8, causal=True)}, (2,)),
        (sd.ulysses, 8, 4, {"mask": stripe_mask(1, 8)}, (2,)),
        (sd.ulysses, 8, 4, {"mask": top_blocks}, (2,)),
        (sd.ulysses, 8, 4, window, (2,)),
        (sd.all_gather_kv, 8, 4, {}, (2, 4)),
        (sd.all_gather_kv, 8, 4, zigzag, (4,)),
        (sd.all_gather_kv, 8, 4, {"mask": block_mask(2, 8, causal=True), "zigzag": True}, (2,)),
        (sd.all_gather_kv, 8, 4, {"mask": top_blocks, "causal": True}, (2,)),
    ]
    for call, heads, heads_kv, options, numbers in cases:
        found = []
        for slices in (1, *numbers):
            leaves = [ranks.part(x).requires_grad_() for x in qkv(heads, heads_kv)]
            out, lse = call(*leaves, slices=slices, return_lse=True, **options)
            assert out.is_contiguous()
            loss = (out * out.detach().sin()).sum() + lse.masked_fill(lse.isinf(), 0).cos().sum()
            found.append([out, lse, *torch.autograd.grad(loss, leaves)])
        for other in found[1:]:
            for one, same in zip(found[0], other, strict=True):
                # Key heads that several slices share have their gradients added up in parts.
                rtol, atol = (0, 0) if heads_kv == heads else (1e-5, 1e-6)
                torch.testing.assert_close(same, one, rtol=rtol, atol=atol)
            assert other[0].equal(found[0][0])
            assert other[1].equal(found[0][1])


@case(2)
def slices_without_derivatives_and_with_other_lengths(ranks):
    with torch.no_grad():
        parts = [ranks.part(x) for x in qkv(length_kv=96)]
        assert sd.ulysses(*parts, slices=4).equal(sd.ulysses(*parts))
    tensors = qkv(length_kv=96)
    agree(ranks, sd.ulysses, sparse_fmha.attention, tensors, whole={"causal": False}, slices=2)
    empty = [x[:, :0] for x in qkv()]
    for call in (sd.ulysses, sd.all_gather_kv):
        assert call(*empty, slices=2).shape == (2, 0, 8, 16)


@case(2)
def slices_that_do_not_divide(ranks):
    parts = [ranks.part(x) for x in qkv()]
    with pytest.raises(ValueError, match="slices must divide the 4 heads of k, got 3"):
        sd.all_gather_kv(*parts, slices=3)
    with pytest.raises(ValueError, match=r"slices must divide the 4 query heads .*, got 3"):
        sd.ulysses(*parts, slices=3)
    for call in (sd.ulysses, sd.all_gather_kv):
        with pytest.raises(ValueError, match="slices must be at least 1, got 0"):
            call(*parts, slices=0)


@case(2, 4)
def anchors_and_vertical_slash_from_end_to_end(ranks):
    q, k, v = qkv()
    parts = [ranks.part(x) for x in (q, k, v)]

    def anchor(q, k, v, return_lse=False):
        found = patterns.anchor_attention(q, k, v, theta=2.0, step=2, block=64)
        return (found.out, found.lse) if return_lse else found.out

    def slash(q, k):
        return patterns.vertical_slash(q, k, vertical=40, slash=110, last=16)

    for slices in (1, 2):
        out, lse = sd.ulysses(*parts, anchor, slices=slices, return_lse=True)
        expected = anchor(q, k, v, return_lse=True)
        ranks.same(out, expected[0])
        ranks.same(lse, expected[1])
        out = sd.ulysses(*parts, mask=slash, slices=slices)
        ranks.same(out, sparse_fmha.stripe_attention(q, k, v, slash(q, k)))
