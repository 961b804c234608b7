"""Forward kernels that skip key tiles, on the emulator, against the definition in fp64."""

import contextlib

import pytest
import skip_cases
import torch
from poison import poisoned

import sparse_fmha
from sparse_fmha import reference

OPS = torch.ops.sparse_fmha
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


def tiles_of(bits, groups, tiles):
    """The tiles of a saved tensor, as booleans [B, H, groups, tiles]; its other bits are zero."""
    places = torch.arange(32, dtype=torch.int32)
    found = (bits[..., None] >> places & 1).flatten(-2).bool()
    assert bits.shape[2] == groups
    assert not found[..., tiles:].any()
    return found[..., :tiles]


@pytest.mark.parametrize("keys", [70, 2700, 33 * TILE, 65 * TILE - 3])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_skipped_is_saved(causal, keys):
    """One word of 32 tiles and several; the last one full, or of one tile."""
    queries = min(keys, 100)
    q, k, v = skip_cases.inputs(queries, keys, heads=2, heads_kv=1, dim=128, batch=1)
    q, k, v = (x.to(BF16) for x in (q, k, v))
    threshold = torch.full((1,), 0.3)
    with sparse_fmha.arch_override("sm90"), poisoned():
        plain = OPS.fmha_fwd(q, k, v, causal, None, threshold)
        saving = OPS.fmha_fwd(q, k, v, causal, None, threshold, save_skipped=True)
    assert len(plain) == 3
    assert all(a.equal(b) for a, b in zip(plain, saving[:3], strict=True))
    saved = tiles_of(saving[3], groups=-(-queries // 64), tiles=-(-keys // TILE))
    visible = torch.ones(queries, keys, dtype=torch.bool)
    visible = visible.tril(keys - queries) if causal else visible
    ranks = reference.tile_ranks(keys, TILE, descending=True)
    _, _, skipped = reference.skip_attention(q, k, v, visible, 0.3, skip_cases.rows(queries), ranks)
    assert skipped.any() or keys <= TILE
    assert saved.equal(skipped.flip(-1))


@pytest.mark.parametrize("way", ["one kernel", "two kernels"])
@pytest.mark.parametrize(("dim", "causal"), [(64, True), (128, False), (128, True)])
def test_gradients_are_those_of_what_is_kept(dim, causal, way):
    """330 tokens: ragged groups and a ragged last tile of keys."""
    length, threshold = 330, 0.3
    given = skip_cases.inputs(length, heads=2, heads_kv=1, dim=dim, batch=1)
    ours = [x.to(BF16).requires_grad_() for x in given]
    only = contextlib.nullcontext() if way == "one kernel" else poisoned()  # deterministic
    with sparse_fmha.arch_override("sm90"), only:
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
