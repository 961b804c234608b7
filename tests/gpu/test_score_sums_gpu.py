"""Kernels that reduce scores, against the whole map in fp64; small cases run on the emulator."""

import emulated
import other_archs
import pytest
import torch
from layouts import amid, with_gaps
from score_cases import NAMES, SHIFTS, built, check, draw, only_kernels

import sparse_fmha
from sparse_fmha import score_sums


@pytest.fixture(autouse=True)
def kernels(monkeypatch, poisoned):
    """All calls run as kernels, and begin with NaN in their results."""
    if other_archs.in_use() != "sm90" or not built():
        pytest.skip("kernels of Hopper, which reduce scores")
    only_kernels(monkeypatch, emulated.is_loaded())
    with poisoned():
        yield


@pytest.mark.parametrize("seed", range(100))
def test_drawn(randn, seed):
    case = draw(seed, randn)
    check(**case, shapes=[list(case[name].shape) for name in "qk"])


@pytest.mark.parametrize("shift", SHIFTS)
def test_corners_of_tiles(randn, shift):
    q, k = randn(1, 260, 1, 64), randn(1, 260 + shift, 1, 64, seed=1)
    check(q, k, causal=True, sizes=(16, 32))
    check(q, k, causal=True, rows=128)


@pytest.mark.parametrize("lengths", [(700, 130), (130, 700)])
def test_more_steps_than_stages(randn, lengths):
    q, k = randn(1, lengths[0], 1, 64), randn(1, lengths[1], 1, 64, seed=1)
    check(q, k, causal=True, sizes=(32, 16))


def test_many_keys(randn):
    """Blocks are stored 16 steps of 128 keys at a time."""
    q, k = randn(1, 70, 1, 64), randn(1, 2048 * 2 + 300, 1, 64, seed=1)
    check(q, k, causal=True, sizes=(16, 128))


def test_parts_of_rows(randn):
    """Few queries share many keys among thread blocks; some parts have no keys."""
    q, k = randn(1, 5, 2, 64), randn(1, 1100, 1, 64, seed=1)
    keys = k.repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), keys.double()) * 0.2
    scores[..., ~torch.ones(5, 1100, dtype=torch.bool, device=q.device).tril(1095)] = -torch.inf
    for parts in (1, 2, 7, 20):
        found = torch.ops.sparse_fmha.score_rows(q, k, True, parts, 0.2)
        assert found.shape == (1, 2, parts, 5)
        joined = found.logsumexp(2).double()
        torch.testing.assert_close(joined, scores.logsumexp(-1), atol=1e-4, rtol=1e-5)


def test_rows_that_see_nothing(randn):
    """More queries than keys: the first ones see none."""
    q, k = randn(1, 300, 1, 64), randn(1, 40, 1, 64, seed=1)
    lse = torch.ops.sparse_fmha.score_rows(q, k, True, 1, 0.2)
    assert (lse[..., :260] == -torch.inf).all()
    assert lse[..., 260:].isfinite().all()
    assert not score_sums(q, k, causal=True, reduce="blocks_max", block_q=64)[:, :, :4].any()


def test_layouts(randn):
    """Strides, with NaN around the operands, and a layout that is copied."""
    q, k = randn(2, 150, 2, 64), randn(2, 140, 1, 64, seed=1)
    expected = score_sums(q, k, causal=True)
    assert expected.equal(score_sums(amid(q, torch.nan), amid(k, torch.nan), causal=True))
    for other in (with_gaps(q, 1), with_gaps(q, 3), q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert expected.equal(score_sums(other, k, causal=True))


def test_same_bits_each_time(randn):
    q, k = randn(1, 400, 2, 64), randn(1, 390, 2, 64, seed=1)
    for name in NAMES:
        assert score_sums(q, k, reduce=name).equal(score_sums(q, k, reduce=name))


def test_as_attention_returns_lse(randn):
    q, k = randn(1, 200, 2, 64), randn(1, 230, 1, 64, seed=1)
    _, lse = sparse_fmha.attention(q, k, k, causal=True, return_lse=True)
    found = score_sums(q, k, lse=lse, causal=True, rows=64, group="mean")
    own = score_sums(q, k, causal=True, rows=64, group="mean")
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-3)
    assert found.shape == (1, 1, 230)


def test_nan_is_not_lost(randn):
    """A query with NaN: its probabilities are NaN, and with them the sums and maxima."""
    q, k = randn(1, 200, 1, 64), randn(1, 150, 1, 64, seed=1)
    q[:, 70] = torch.nan
    assert score_sums(q, k).isnan().all()
    for name in ("blocks_max", "blocks_sum"):
        found = score_sums(q, k, reduce=name)
        assert found[:, :, 1].isnan().all()
        assert found[:, :, [0, 2, 3]].isfinite().all()
