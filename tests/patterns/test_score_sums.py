"""Sums and maxima of probabilities, against the whole map in fp64."""

import pytest
import torch
from dispatch_watch import Watch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_oracle import probabilities, reduced

import sparse_fmha
from sparse_fmha import score_sums
from sparse_fmha.selection import reductions


@settings(max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([(1, 1), (6, 2), (2, 2)]),
    st.sampled_from(reductions.REDUCTIONS),
    st.booleans(),
    st.sampled_from([None, 1, 17, 200]),
    st.sampled_from([None, "mean", "max"]),
    st.sampled_from([(16, 16), (7, 33), (64, 64)]),
    st.sampled_from([1, 1000, 1 << 24]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_the_definition(q_len, kv_len, heads, reduce, causal, rows, group, sizes, most, dtype):
    generator = torch.Generator().manual_seed(q_len + 100 * kv_len)
    q = torch.randn(2, q_len, heads[0], 16, generator=generator).to(dtype)
    k = torch.randn(2, kv_len, heads[1], 16, generator=generator).to(dtype)
    causal = causal or reduce == "diagonals"
    options = {"reduce": reduce, "rows": rows, "causal": causal, "scale": 0.4, "group": group}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "SLICE", most)
        made = score_sums(q, k, **options, block_q=sizes[0], block_kv=sizes[1])
    expected = reduced(probabilities(q, k, causal, 0.4), reduce, rows or q_len, *sizes)
    if group is not None:
        own = expected.unflatten(1, (heads[1], -1))
        expected = own.mean(2) if group == "mean" else own.amax(2)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduce", reductions.REDUCTIONS)
def test_given_denominators(randn, reduce):
    q, k, v = randn(2, 50, 4, 16), randn(2, 70, 2, 16, seed=1), randn(2, 70, 2, 16, seed=2)
    _, lse = sparse_fmha.attention(q, k, v, causal=True, return_lse=True)
    found = score_sums(q, k, lse=lse, reduce=reduce, causal=True, rows=33)
    torch.testing.assert_close(found, score_sums(q, k, reduce=reduce, causal=True, rows=33))
    # A learned sink adds to the denominator; a row of -inf counts for nothing.
    lse = torch.logaddexp(lse, torch.ones(4))
    lse[:, 45] = -torch.inf
    known = probabilities(q, k, True, 0.25, lse)
    found = score_sums(q, k, lse=lse, reduce=reduce, causal=True)
    torch.testing.assert_close(
        found.double(), reduced(known, reduce, 50, 64, 64), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("reduce", reductions.REDUCTIONS)
def test_neither_the_host_nor_the_map(randn, monkeypatch, reduce):
    monkeypatch.setattr(reductions, "SLICE", 1)
    q, k = randn(1, 1024, 4, 16), randn(1, 1024, 2, 16)
    with Watch() as watch:
        made = score_sums(q, k, reduce=reduce, causal=True)
    assert watch.largest <= max(64 * 1024, q.numel())
    assert score_sums(q.to("meta"), k.to("meta"), reduce=reduce, causal=True).shape == made.shape


@pytest.mark.parametrize("reduce", reductions.REDUCTIONS)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(reduce, lengths):
    q, k = torch.zeros(1, lengths[0], 2, 16), torch.zeros(1, lengths[1], 1, 16)
    assert not score_sums(q, k, reduce=reduce, causal=True).any()


def test_autocast_and_gradients(randn):
    q, k = randn(1, 100, 2, 16).requires_grad_(), randn(1, 100, 1, 16, seed=1)
    expected = score_sums(q, k)
    assert not expected.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert score_sums(q, k).equal(expected)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            ValueError,
            "reduce must be columns, diagonals, blocks_max or blocks_sum, got 'rows'",
            {"reduce": "rows"},
        ),
        (
            ValueError,
            "causal must be True with reduce 'diagonals', got False",
            {"reduce": "diagonals"},
        ),
        (ValueError, "group must be mean or max, got 'sum'", {"group": "sum"}),
        (ValueError, "rows must be at least 1, got 0", {"rows": 0}),
        (ValueError, "block_q must be at least 1, got 0", {"block_q": 0}),
        (TypeError, r"block_kv must be an int, got 1\.5", {"block_kv": 1.5}),
        (TypeError, "causal must be True or False, got 1", {"causal": 1}),
        (ValueError, "scale must be a finite number, got inf", {"scale": float("inf")}),
        (
            ValueError,
            r"lse must have shape \[1, 9, 2\], got \[1, 9, 3\]",
            {"lse": torch.ones(1, 9, 3)},
        ),
        (ValueError, r"lse must have shape \[1, 9, 2\], got \[9\]", {"lse": torch.ones(9)}),
        (TypeError, "lse must be a tensor, got float", {"lse": 0.5}),
    ],
)
def test_errors(error, message, options):
    q = torch.zeros(1, 9, 2, 16)
    with pytest.raises(error, match=message):
        score_sums(q, q, **options)
