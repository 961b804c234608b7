"""Pooling of blocks and their scores, against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_fmha.selection import BlockGrid, block_scores, pool_blocks, pooled_scores, pooling

INF = float("inf")
FEW = settings(max_examples=40)
FUNCTIONS = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@FEW
@given(
    st.integers(1, 2),
    st.integers(0, 70),
    st.integers(1, 3),
    st.integers(1, 33),
    st.sampled_from(sorted(FUNCTIONS)),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.booleans(),
    st.sampled_from([1, 50, 1 << 24]),
)
def test_pooling(batch, length, heads, block, reduce, dtype, strided, most):
    x = normal(batch, heads, length, 8, dtype=dtype).transpose(1, 2)
    x = x if strided else x.contiguous()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "CACHED", most)
        pooled = pool_blocks(x, block, reduce)
    assert pooled.dtype == torch.float32
    assert pooled.shape == (batch, math.ceil(length / block), heads, 8)
    for n in range(pooled.shape[1]):
        tokens = x[:, n * block : (n + 1) * block].double()
        torch.testing.assert_close(pooled[:, n], FUNCTIONS[reduce](tokens, 1).float())


@FEW
@given(
    st.integers(1, 2),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)]),
    st.sampled_from([None, 0.3, -2]),
    st.booleans(),
    st.sampled_from([None, "grid", "heads"]),
)
def test_scores(batch, rows, columns, heads, scale, softmax, mask):
    q, k = normal(batch, rows, heads[0], 8), normal(batch, columns, heads[1], 8, seed=1)
    shape = (rows, columns) if mask == "grid" else (heads[0], rows, columns)
    allowed = None if mask is None else normal(*shape, seed=2) > 0
    scores = pooled_scores(q, k, scale=scale, allowed=allowed, softmax=softmax)
    assert scores.shape == (batch, heads[0], rows, columns)
    factor = 8**-0.5 if scale is None else scale
    for b in range(batch):
        for h in range(heads[0]):
            own = k[b, :, h // (heads[0] // heads[1])].double()
            expected = factor * q[b, :, h].double() @ own.T
            if mask:
                seen = allowed if mask == "grid" else allowed[h]
                expected[~seen] = -INF
            if softmax:
                weights = expected.exp()
                expected = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
            torch.testing.assert_close(scores[b, h], expected.float(), atol=1e-5, rtol=1e-5)


def test_rows_without_blocks_have_no_nan_gradients():
    q, k = normal(1, 2, 1, 8).requires_grad_(), normal(1, 3, 1, 8)
    allowed = torch.tensor([[False] * 3, [True, False, True]])
    scores = pooled_scores(q, k, allowed=allowed, softmax=True)
    assert torch.equal(scores[0, 0, 0], torch.zeros(3))
    (scores * normal(3)).sum().backward()
    assert q.grad[0, 0].abs().max() == 0
    assert q.grad[0, 1].abs().min() > 0


def test_scores_stay_fp32_under_autocast():
    q, k = normal(1, 4, 2, 64), normal(1, 5, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        scores = pooled_scores(q, k)
    assert torch.equal(scores, pooled_scores(q, k))


def test_scores_of_tokens():
    q, k = normal(1, 300, 4, 8), normal(1, 400, 2, 8, seed=1)
    grid = BlockGrid.of(q, k, 64, 32, causal=True)
    means = [
        torch.stack([part.mean(1) for part in x.split(block, 1)], 1)
        for x, block in ((q, 64), (k, 32))
    ]
    expected = torch.einsum("bihd,bjhd->bhij", means[0], means[1].repeat_interleave(2, 2)) * 2
    for i, j in torch.cartesian_prod(torch.arange(5), torch.arange(13)).tolist():
        if 32 * j > min(64 * i + 63, 299) + 100:
            expected[:, :, i, j] = -INF
    torch.testing.assert_close(block_scores(q, k, grid, scale=2), expected)
    with pytest.raises(ValueError, match="q must have the 301 tokens of the grid, got 300"):
        block_scores(q, k, BlockGrid(301, 400))


X = normal(1, 10, 2, 8)
ROWS = normal(2, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pool_blocks(X[0], 4),
            ValueError,
            r"x must have shape \[batch, tokens, heads, head dim\], got \[10, 2, 8\]",
        ),
        (lambda: pool_blocks(X.int(), 4), TypeError, "x must have .*dtype.*, got torch.int32"),
        (lambda: pool_blocks([1], 4), TypeError, "x must be a tensor, got list"),
        (lambda: pool_blocks(X, 0), ValueError, "block must be at least 1, got 0"),
        (lambda: pool_blocks(X, 1.5), TypeError, "block must be an int, got 1.5"),
        (
            lambda: pool_blocks(X, 2, "sum"),
            ValueError,
            "reduce must be mean, max or min, got 'sum'",
        ),
        (
            lambda: pooled_scores(X, X[..., :4]),
            ValueError,
            r"k_pooled must have the batch and head dim of q_pooled, of shape \[1,",
        ),
        (
            lambda: pooled_scores(X[:, :, :1], X),
            ValueError,
            "heads of q_pooled must be a multiple of those of k_pooled, got 1 and 2",
        ),
        (
            lambda: pooled_scores(X, X, scale=INF),
            ValueError,
            "scale must be a finite number, got inf",
        ),
        (lambda: pooled_scores(X, X, softmax=1), TypeError, "softmax must be True or False, got 1"),
        (
            lambda: pooled_scores(X, X, allowed=X),
            TypeError,
            "allowed must be a bool tensor, got torch.float32",
        ),
        (
            lambda: pooled_scores(X, X, allowed=ROWS > 0),
            ValueError,
            r"allowed must have a shape that broadcasts to \[1, 2, 10, 10\], got \[2,",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
