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
