"""Sol-Attn against its definition: one softmax over exact keys and pooled blocks, in fp64."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import BlockGrid, patterns, reference
from sparse_fmha.patterns import sol


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(length, heads=(4, 2), seed=0):
    q, k, v = (normal(2, length, h, 16, seed=seed + n) for n, h in enumerate((*heads, heads[1])))
    runs = torch.arange(length) // 64
    near = [2 * normal(2, length // 64 + 1, h, 16, seed=seed + 7 + h)[:, runs] for h in heads]
    return q + near[0], k + near[1], v


def means(x, block):
    return torch.stack([part.double().mean(1) for part in x.split(block, 1)], 1)


def chosen(q, k, tau, block, scale):
    """The exact blocks, by loops."""
    queries = means(q, block)
    keys = means(k, block).repeat_interleave(q.shape[2] // k.shape[2], 2)
    batch, count, heads, dim = queries.shape
    scale = dim**-0.5 if scale is None else scale
    exact = torch.zeros(batch, heads, count, count, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, exact.shape[:3])).tolist():
        own = keys[b, :, h]
        center, variance = own.mean(0), own.var(0, unbiased=False)
        row = queries[b, i, h]
        for j in range(count):
            spread = tau * abs(scale) * math.sqrt((row.square() * variance).sum())
            exact[b, h, i, j] = scale * (row @ (own[j] - center)) > spread or abs(i - j) <= 1
            if j == count - 1 and k.shape[1] % block:
                exact[b, h, i, j] = True
    return exact


def logits(q, k, v, exact, block, rest, scale):
    """Of all tokens of exact blocks and one key for each other block, and their values."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 2) for x in (k, v))
    at = torch.arange(length) // block
    pooled_by = q if rest == "token" else means(q, block)[:, at]
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.masked_fill(~exact[:, :, at][..., at], -torch.inf)
    pooled = scale * torch.einsum("bihd,bjhd->bhij", pooled_by, means(k, block)) + math.log(block)
    pooled = pooled.masked_fill(exact[:, :, at], -torch.inf)
    return torch.cat([scores, pooled], -1), torch.cat([v, means(v, block)], 1)


def definition(*given):
    scores, values = logits(*given)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)


@pytest.mark.parametrize("rest", ["token", "block"])
@pytest.mark.parametrize(
    ("length", "tau", "block", "scale"),
    [(640, 1.0, 64, None), (715, 0.5, 64, 0.3), (1000, 1.0, 128, None), (50, 1.0, 64, None)],
)
def test_definition(length, tau, block, scale, rest):
    q, k, v = inputs(length, seed=length)
    options = {"tau": tau, "block": block, "scale": scale}
    with Watch():
        exact = patterns.sol_blocks(q, k, **options)
        out = patterns.sol_attention(q, k, v, **options, rest=rest)
    assert torch.equal(exact, chosen(q, k, tau, block, scale))
    near = BlockGrid.of(q, k, block, block).local(2)
    assert length == 50 or (exact & ~near).any()
    assert length == 50 or not exact.all()
    expected = definition(q, k, v, exact, block, rest, scale)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("length", [50, 715])  # of the first no block is left to pool
@pytest.mark.parametrize("rest", ["token", "block"])
def test_lse(length, rest):
    q, k, v = inputs(length)
    out, lse = sol.with_lse(q, k, v, tau=0.5, rest=rest)
    assert out.equal(patterns.sol_attention(q, k, v, tau=0.5, rest=rest))
    scores, _ = logits(q, k, v, patterns.sol_blocks(q, k, tau=0.5), 64, rest, None)
    expected = scores.logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(lse.double(), expected, atol=2e-5, rtol=2e-5)


def test_keeping_all_is_dense():
    """Also where no block is left to pool."""
    q, k, v = inputs(300)
    dense, _ = reference.attention(q, k, v, torch.ones(300, 300, dtype=torch.bool))
    for rest in ("token", "block"):
        out = patterns.sol_attention(q, k, v, tau=-100.0, rest=rest)
        torch.testing.assert_close(out.double(), dense, atol=2e-5, rtol=2e-5)


def test_forced():
    q, k, _ = inputs(640)
    grid = BlockGrid.of(q, k, 64, 64)
    plain = patterns.sol_blocks(q, k, tau=3.0)
    forced = patterns.sol_blocks(q, k, tau=3.0, forced=grid.tokens(-100))
    assert torch.equal(forced, plain | grid.tokens(-100))
    assert not plain[..., 0, 9].any()


@pytest.mark.parametrize("tau", [1.0, -100.0])  # with the second, no block is left to pool
@pytest.mark.parametrize("rest", ["token", "block"])
def test_gradients(rest, tau):
    leaves = [x[:1].double().requires_grad_() for x in inputs(400)]
    exact = patterns.sol_blocks(*leaves[:2], tau=tau)
    weight = normal(1, 400, 4, 16, seed=4)
    out = patterns.sol_attention(*leaves, tau=tau, rest=rest)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    expected = definition(*leaves, exact, 64, rest, None)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


Q = normal(1, 128, 2, 16)
A = patterns.sol_attention


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: A(Q, Q, Q, tau=float("inf")), ValueError, "tau must be finite, got inf"),
        (lambda: A(Q, Q, Q, rest="x"), ValueError, "rest must be token or block, got 'x'"),
        (lambda: A(Q, Q, Q, block=32), ValueError, "block_q must be 64 or 128, got 32"),
        (lambda: A(Q, Q[:, 1:], Q[:, 1:]), ValueError, "k must have the 128 tokens of q, got 127"),
        (
            lambda: A(Q, Q, Q, forced=Q),
            TypeError,
            r"forced must be a bool tensor, got torch\.float32",
        ),
        (
            lambda: A(Q, Q, Q, forced=torch.ones(3) > 0),
            ValueError,
            r"forced must have a shape that broadcasts to \[1, 2, 2, 2\], got \[3\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
