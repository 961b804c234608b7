"""Forward kernels that skip key tiles, on the emulator, against the definition in fp64."""

import pytest
import skip_cases
import torch
from poison import poisoned

import sparse_fmha
from sparse_fmha import reference

BF16 = torch.bfloat16
TILE = 80  # keys that are skipped together, the last ones first (docs/design.md, Skipping)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_tiles_are_skipped(causal, threshold):
    length = 450
    given = skip_cases.inputs(length, heads=2, heads_kv=1, dim=128, batch=1)
    q, k, v = (x.to(BF16) for x in given)
    with sparse_fmha.arch_override("sm90"), poisoned():  # sm80 has no such rows
        out, lse, stats = sparse_fmha.attention(
            q, k, v, causal=causal, skip_threshold=threshold, return_lse=True, return_stats=True
        )
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    groups = skip_cases.rows(length)
    ranks = reference.tile_ranks(length, TILE, descending=True)
    exact, exact_lse, skipped = reference.skip_attention(q, k, v, visible, threshold, groups, ranks)
    assert stats.skipped.equal(skipped.sum((2, 3)))
    assert bool(stats.skipped.any()) == (threshold > 0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4)
    assert (out - exact).abs().max() <= 2 * torch.finfo(BF16).eps * exact.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_what_is_kept(causal):
    """330 tokens: ragged groups and a ragged last tile of keys."""
    length, threshold = 330, 0.3
    given = skip_cases.inputs(length, heads=2, heads_kv=1, dim=128, batch=1)
    ours = [x.to(BF16).requires_grad_() for x in given]
    with sparse_fmha.arch_override("sm90"):
        out, lse = sparse_fmha.attention(
            *ours, causal=causal, skip_threshold=threshold, return_lse=True
        )
        dout, dlse = skip_cases.cotangents(out.detach(), lse.detach())
        with poisoned():
            found = torch.autograd.grad((out, lse), ours, (dout, dlse))
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    ranks = reference.tile_ranks(length, TILE, descending=True)
    theirs = [x.detach().double().requires_grad_() for x in ours]
    q, k, v = theirs[0], *(x.repeat_interleave(2, 2) for x in theirs[1:])
    exact, exact_lse, skipped = reference.skip_attention(
        q, k, v, visible, threshold, skip_cases.rows(length), ranks
    )
    assert skipped.any()
    wanted = torch.autograd.grad(
        (exact, exact_lse), theirs, (dout.to(exact.dtype), dlse.to(exact_lse.dtype))
    )
    for gradient, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            gradient.double(), one, rtol=2e-2, atol=1e-2 * one.abs().max().item()
        )
