"""Sol-Attn's extra tokens and its share of blocks against their definition, by loops in fp64."""

import math

import pytest
import torch

from sparse_fmha import BlockGrid, _sizes, patterns, reference
from sparse_fmha.patterns import _sol_tokens, sol


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(length, heads=(4, 2), seed=0):
    return [normal(2, length, h, 16, seed=seed + n) for n, h in enumerate((*heads, heads[1]))]


def definition(q, k, v, exact, n, block, scale=None):
    """Returns out and lse. In one softmax: keys of exact blocks; the n keys of other whole blocks
    with the largest products with the mean query; what is left of each block as one key."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    outs, lses = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    for b, h in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[2])).tolist():
        keys, values = k[b, :, h // group], v[b, :, h // group]
        for i in range(math.ceil(length / block)):
            rows = q[b, i * block : (i + 1) * block, h]
            mean = rows.mean(0)
            listed = torch.arange(length)[exact[b, h, i][torch.arange(length) // block]]
            open_ = [j for j in range(length // block) if not exact[b, h, i, j]]
            others = torch.cat(
                [torch.arange(j * block, (j + 1) * block) for j in open_] or [listed[:0]]
            )
            best = (keys[others] @ mean * math.copysign(1, scale)).argsort(descending=True)[:n]
            single = others[best]
            own = torch.cat([listed, single])
            logits, found = [scale * rows @ keys[own].T], [values[own]]
            for j in open_:
                rest = [
                    t for t in range(j * block, (j + 1) * block) if t not in set(single.tolist())
                ]
                if rest:
                    one = scale * mean @ keys[rest].mean(0) + math.log(len(rest))
                    logits.append(one.expand(len(rows), 1))
                    found.append(values[rest].mean(0)[None])
            logits = torch.cat(logits, 1)
            outs[b, i * block : (i + 1) * block, h] = logits.softmax(-1) @ torch.cat(found)
            lses[b, i * block : (i + 1) * block, h] = logits.logsumexp(-1)
    return outs, lses


@pytest.mark.parametrize(
    ("length", "block", "n", "scale"),
    [(320, 64, 1, None), (459, 64, 70, 0.3), (520, 128, 256, None), (459, 64, 256, -0.2)],
)
def test_extra_tokens(length, block, n, scale):
    q, k, v = inputs(length, seed=length)
    options = {"tau": 2.0, "block": block, "scale": scale}
    exact = patterns.sol_blocks(q, k, **options)
    out, lse = sol.with_lse(q, k, v, **options, rest="block", extra_tokens=n)
    expected = definition(q.double(), k.double(), v.double(), exact, n, block, scale)
    torch.testing.assert_close((out.double(), lse.double()), expected, atol=3e-5, rtol=3e-5)
    without = patterns.sol_attention(q, k, v, **options, rest="block")
    assert not torch.allclose(out, without, atol=1e-2)


def test_without_extra_tokens_it_is_as_before():
    q, k, v = inputs(320)
    exact = patterns.sol_blocks(q, k, tau=2.0)
    out, _ = definition(q.double(), k.double(), v.double(), exact, 0, 64)
    found = patterns.sol_attention(q, k, v, tau=2.0, rest="block", extra_tokens=0)
    torch.testing.assert_close(found.double(), out, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("length", [300, 320, 50])
def test_all_tokens_are_dense(length):
    q, k, v = inputs(length)
    dense, _ = reference.attention(q, k, v, torch.ones(length, length, dtype=torch.bool))
    out = patterns.sol_attention(q, k, v, tau=9.0, rest="block", extra_tokens=1000)
    torch.testing.assert_close(out.double(), dense, atol=3e-5, rtol=3e-5)


def test_more_tokens_come_closer_to_dense():
    q, k, v = inputs(640)
    dense, _ = reference.attention(q, k, v, torch.ones(640, 640, dtype=torch.bool))
    errors = [
        (patterns.sol_attention(q, k, v, tau=9.0, rest="block", extra_tokens=n) - dense).norm()
        for n in (0, 64, 256)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_a_few_rows_and_heads_at_a_time(monkeypatch):
    q, k, v = inputs(459)
    options = {"tau": 2.0, "rest": "block", "extra_tokens": 40}
    expected = sol.with_lse(q, k, v, **options)
    monkeypatch.setattr(_sizes, "SLICE", 1)
    monkeypatch.setattr(_sol_tokens, "SLICE", 1)
    torch.testing.assert_close(sol.with_lse(q, k, v, **options), expected, atol=1e-6, rtol=1e-6)


def test_gradients():
    leaves = [x[:1].double().requires_grad_() for x in inputs(320)]
    exact = patterns.sol_blocks(*leaves[:2], tau=2.0)
    weight = normal(1, 320, 4, 16, seed=4)
    out = patterns.sol_attention(*leaves, tau=2.0, rest="block", extra_tokens=40)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    expected, _ = definition(*leaves, exact, 40, 64)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_a_share_of_the_blocks(keep):
    """Those of the largest scores, and the ones that are always exact."""
    q, k, v = inputs(640)
    found = patterns.sol_blocks(q, k, keep=keep, forced=BlockGrid.of(q, k, 64, 64).keys(0, 64))
    group = q.shape[2] // k.shape[2]
    means = [x.unflatten(1, (10, 64)).mean(2).transpose(1, 2) for x in (q, k)]
    scores = means[0] @ means[1].repeat_interleave(group, 1).mT
    least = scores.sort(-1, descending=True).values[..., round(keep * 10) - 1]
    at = torch.arange(10)
    always = ((at[:, None] - at).abs() <= 1) | (at == 0)
    assert found.equal((scores >= least[..., None]) | always)
    out = patterns.sol_attention(q, k, v, keep=1.0)
    dense, _ = reference.attention(q, k, v, torch.ones(640, 640, dtype=torch.bool))
    torch.testing.assert_close(out.double(), dense, atol=3e-5, rtol=3e-5)


Q = normal(1, 128, 2, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"extra_tokens": 64}, ValueError, "extra_tokens must be 0 with rest='token', got 64"),
        ({"extra_tokens": -1}, ValueError, "extra_tokens must be at least 0, got -1"),
        ({"extra_tokens": 1.5}, TypeError, "extra_tokens must be an int, got 1.5"),
        ({"keep": 1.1}, ValueError, "keep must be from 0 to 1, got 1.1"),
        ({"keep": "all"}, TypeError, "keep must be a number, got 'all'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        patterns.sol_attention(Q, Q, Q, **options)
