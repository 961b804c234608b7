"""Rectified SpaAttn against its definition, written with loops in fp64."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import patterns, reference


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(length, heads=(4, 2), dim=16, seed=0):
    """Tokens near the vector of their run of 64, so that some means are worth more than others."""
    q, k, v = (normal(2, length, h, dim, seed=seed + n) for n, h in enumerate((*heads, heads[1])))
    runs = torch.arange(length) // 64
    near = [normal(2, length // 64 + 1, h, dim, seed=seed + 7 + h)[:, runs] for h in heads]
    return 0.2 * q + near[0], 0.3 * k + near[1], v


def definition(q, k, text, keep, theta, block, forced=None, scale=None):
    """Selected blocks, scale and rest of each row, by the formulas of the docstring."""
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[2], 2)
    visual, total = length - text, -(-length // block)
    blocks = -(-visual // block)
    dense_from = visual // block if text else total  # blocks with text in them
    chosen = torch.zeros(batch, heads, total, total, dtype=torch.bool)
    factor = torch.ones(batch, heads, total, dtype=torch.float64)
    rest = torch.zeros(batch, heads, total, total, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            parts_q = [q[b, n * block : min((n + 1) * block, visual), h] for n in range(blocks)]
            parts_k = [k[b, n * block : min((n + 1) * block, visual), h] for n in range(blocks)]
            for i in range(total):
                chosen[b, h, i, dense_from:] = True
                if i >= dense_from:
                    chosen[b, h, i] = True
                    continue
                mean = parts_q[i].mean(0)
                mass = [len(p) * math.exp(scale * (mean @ p.mean(0))) for p in parts_k]
                mass.append(sum(math.exp(scale * (mean @ t)) for t in k[b, visual:, h]))
                shares = [m / sum(mass) for m in mass]
                order = sorted(range(blocks + 1), key=lambda n: -shares[n])
                before = 0.0
                for rank, n in enumerate(order):
                    if n < blocks and (before < theta or rank < max(1, int(keep * blocks + 1e-9))):
                        chosen[b, h, i, n] = True
                    before += shares[n]
                if forced is not None:
                    chosen[b, h, i] |= forced[i]
                for j in range(blocks):
                    key = parts_k[j].mean(0)
                    error = abs((parts_q[i] - mean).abs().mean(0) @ key)
                    error += abs(mean @ (parts_k[j] - key).abs().mean(0))
                    if not chosen[b, h, i, j] and abs(mean @ key) > error:
                        rest[b, h, i, j] = shares[j]
                factor[b, h, i] = 1 - rest[b, h, i].sum()
    return chosen, factor, rest


CASES = [
    (640, 0, 0.2, 0.3, 64, None),
    (650, 0, 0.5, 0.1, 64, None),  # a short block
    (640, 128, 0.1, 0.5, 64, 0.3),
    (700, 77, 0.0, 0.4, 128, None),  # a block of text and video
]


@pytest.mark.parametrize("case", CASES)
def test_definition(case):
    length, text, keep, theta, block, scale = case
    q, k, v = inputs(length, seed=length)
    options = {"text": text, "keep": keep, "theta": theta, "block": block, "scale": scale}
    with Watch():
        plan = patterns.rectified(q, k, **options)
    plan.mask.validate()
    chosen, factor, rest = definition(q, k, **options)
    assert torch.equal(plan.mask.blocks(), chosen)
    assert 0 < (rest > 0).sum() < rest.numel()
    assert not chosen.all()
    torch.testing.assert_close(plan.scale.double(), factor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plan.rest.double(), rest, atol=1e-5, rtol=1e-5)

    out = patterns.rectified_attention(q, k, v, **options)
    tokens = chosen.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :length, :length]
    sparse, _ = reference.attention(q, k, v, tokens, scale)
    values = v.double().repeat_interleave(2, 2)
    means = torch.stack([part.mean(1) for part in values.split(block, 1)], 1)
    more = torch.einsum("bhij,bjhd->bihd", rest, means)
    rows = torch.arange(length) // block
    expected = sparse * factor.transpose(1, 2)[:, rows, :, None] + more[:, rows]
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_everything_kept_is_dense():
    q, k, v = inputs(300)
    out = patterns.rectified_attention(q, k, v, keep=1.0, block=64)
    dense, _ = reference.attention(q, k, v, torch.ones(300, 300, dtype=torch.bool))
    torch.testing.assert_close(out.double(), dense, atol=2e-5, rtol=2e-5)


def test_forced_blocks_and_a_plan_of_another_step():
    q, k, v = inputs(320)
    forced = torch.eye(5, dtype=torch.bool).roll(1, 0)
    plan = patterns.rectified(q, k, keep=0.2, block=64, forced=forced)
    expected, _, _ = definition(q, k, 0, 0.2, 0.3, 64, forced)
    assert torch.equal(plan.mask.blocks(), expected)
    out = patterns.rectified_attention(q, k, v, plan=plan)
    again = patterns.rectified_attention(q, k, v, keep=0.2, block=64, forced=forced)
    assert torch.equal(out, again)


def test_gradients():
    """With the plan as a constant, out is linear in v, and its derivative in q is the op's."""
    q, k, v = (x[:1].double().requires_grad_() for x in inputs(200))
    plan = patterns.rectified(q, k, keep=0.3, block=64, text=20)
    weight = normal(1, 200, 4, 16, seed=9)
    (patterns.rectified_attention(q, k, v, plan=plan) * weight).sum().backward()
    ours = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    tokens = plan.mask.to_dense()
    out, _ = reference.attention(q, k, v, tokens)
    means = torch.stack([part.mean(1) for part in v.split(64, 1)], 1).repeat_interleave(2, 2)
    rows = torch.arange(200) // 64
    more = torch.einsum("bhij,bjhd->bihd", plan.rest.double(), means)[:, rows]
    expected = out * plan.scale.double().transpose(1, 2)[:, rows, :, None] + more
    (expected * weight).sum().backward()
    for mine, x in zip(ours, (q, k, v), strict=True):
        torch.testing.assert_close(mine, x.grad, atol=1e-5, rtol=1e-5)


Q = normal(1, 128, 2, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": 128}, ValueError, "text must be less than the 128 tokens of q, got 128"),
        ({"text": -1}, ValueError, "text must be at least 0, got -1"),
        ({"keep": 1.5}, ValueError, r"keep must be from 0 to 1, got 1\.5"),
        ({"theta": "x"}, TypeError, "theta must be a number, got 'x'"),
        ({"block": 32}, ValueError, "block_q must be 64 or 128, got 32"),
        (
            {"forced": torch.ones(2, 2)},
            TypeError,
            r"forced must be a bool tensor, got torch\.float32",
        ),
        (
            {"forced": torch.ones(5, 5) > 0, "block": 64},
            ValueError,
            r"forced must have a shape that broadcasts to \[1, 2, 2, 2\], got \[5, 5\]",
        ),
        ({"k": Q[:, 1:]}, ValueError, "k must have the 128 tokens of q, got 127"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        patterns.rectified(Q, options.pop("k", Q), **options)
