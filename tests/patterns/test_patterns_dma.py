"""Trainable dynamic mask attention against its definition, pair by pair."""

import pytest
import torch
from bias_oracle import attend
from dispatch_watch import Watch

from sparse_fmha import patterns

INF = float("inf")


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def kept(bias, keep, q_len):
    """bool [B, H, q_len, N]: the `keep` largest of the keys up to each row, by a sort of each."""
    n = bias.shape[-1]
    seen = torch.arange(n) <= torch.arange(q_len)[:, None] + n - q_len
    rows = bias[:, :, None].expand(-1, -1, q_len, -1).masked_fill(~seen, -INF)
    rank = rows.argsort(-1, descending=True).argsort(-1)
    return (rank < keep) & seen


def visible(made):
    seen = made.mask.to_dense()
    return seen & (made.key_bias[:, :, None] >= made.row_threshold[..., None])


@pytest.mark.parametrize(
    ("n", "q_len", "keep", "block_q", "heads_kv", "heads"),
    [
        (300, 300, 40, 64, 2, 4),
        (300, 170, 40, 128, 1, 4),
        (200, 200, 500, 64, 2, 2),  # all are kept
        (257, 257, 1, 64, 1, 1),
        (400, 100, 130, 64, 3, 3),  # more are kept than a group has
        (129, 1, 64, 192, 2, 2),
        (150, 140, 1, 192, 1, 2),  # more rows past the end than are kept
        (70, 0, 40, 64, 2, 4),
    ],
)
def test_exactly_the_largest(n, q_len, keep, block_q, heads_kv, heads):
    bias = draw(2, heads_kv, n)
    made = patterns.dma_mask(bias, keep, heads=heads, q_len=q_len, block_q=block_q)
    made.mask.validate()
    copies = heads // heads_kv if heads_kv > 1 else 1
    assert visible(made).equal(kept(bias, keep, q_len).repeat_interleave(copies, 1))
    assert made.mask.columns.shape[3] <= keep
    assert made.key_bias.equal(bias.repeat_interleave(copies, 1))


@pytest.mark.parametrize("heads_kv", [1, 2])
def test_attention_and_the_gradient_of_the_bias(heads_kv):
    """As dense attention under the definition's mask, with the bias added."""
    q, k, v = (draw(2, 150, h, 16, seed=h, dtype=torch.float64) for h in (4, 2, 2))
    v = v + 1
    bias = draw(2, heads_kv, 150, seed=7).requires_grad_()
    given = [x.requires_grad_() for x in (q, k, v)] + [bias]
    out = patterns.dma_attention(q, k, v, bias, 30, block_q=64, scale=0.3)
    mask = kept(bias.detach(), 30, 150).repeat_interleave(4 // heads_kv, 1)
    whole = bias.repeat_interleave(4 // heads_kv, 1)
    expected, _ = attend(q, k, v, mask, 0.3, whole)
    torch.testing.assert_close(out, expected)
    by = draw(*out.shape, seed=9, dtype=torch.float64)
    found = torch.autograd.grad(out, given, by)
    for a, b in zip(found, torch.autograd.grad(expected, given, by), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert found[3].ne(0).any()


def test_equal_biases():
    """The w largest are kept and nothing smaller; of equal ones at most a group more."""
    bias = torch.randint(4, (2, 2, 300), generator=torch.Generator().manual_seed(0)).float()
    seen = visible(patterns.dma_mask(bias, 50, block_q=64))
    must = kept(bias, 50, 300)
    least = bias[:, :, None].masked_fill(~must, INF).amin(-1, keepdim=True)
    above = bias[:, :, None] > least
    causal = torch.ones(300, 300, dtype=torch.bool).tril()
    assert (above & causal & ~seen).sum() == 0
    assert (seen & (bias[:, :, None] < least)).sum() == 0
    number = seen.sum(-1)
    assert (number >= must.sum(-1)).all()
    assert (number <= 50 + 64).all()
    # As at the start of training: the latest ones.
    window = visible(patterns.dma_mask(torch.ones(1, 1, 300), 50, block_q=64))
    row = torch.arange(300)[:, None]
    first = (row // 64 * 64 - 50).clamp(min=0)
    assert window[0, 0].equal((torch.arange(300) >= first) & causal)


def test_the_layer():
    torch.manual_seed(0)
    layer = patterns.DMABias(2, 16)
    v = draw(3, 50, 2, 16)
    assert layer(v).equal(torch.ones(3, 2, 50))
    torch.nn.init.normal_(layer.decay)
    z = torch.einsum("bjc,hc->bhj", v.flatten(2).double(), layer.weight.double())
    expected = (layer.decay.double()[:, None] * torch.nn.functional.softplus(z)).exp()
    torch.testing.assert_close(layer(v).double(), expected, rtol=1e-5, atol=1e-6)
    half = patterns.DMABias(2, 16, dtype=torch.bfloat16)
    assert half(v.bfloat16()).dtype == torch.float32
    q, k = draw(3, 50, 4, 16, seed=1), draw(3, 50, 2, 16, seed=2)
    patterns.dma_attention(q, k, v, layer(v), 20).square().sum().backward()
    assert layer.decay.grad.ne(0).all()
    assert layer.weight.grad.ne(0).any()


def test_nothing_holds_all_pairs_or_waits():
    n, keep, block_q = 4096, 64, 64
    bias = draw(1, 2, n)
    with Watch() as watch:
        patterns.dma_mask(bias, keep, block_q=block_q)
    assert watch.largest < n * n // 4
    made = patterns.dma_mask(bias.to("meta"), keep, block_q=block_q)
    assert made.mask.columns.shape == (1, 2, n // block_q, keep)


def test_one_graph():
    q, k, v = (draw(1, 130, h, 16, seed=h) for h in (4, 2, 2))
    bias = draw(1, 2, 130, seed=5)
    torch.compiler.reset()
    compiled = torch.compile(patterns.dma_attention, backend="aot_eager", fullgraph=True)
    found = compiled(q, k, v, bias, 40, block_q=64)
    torch.testing.assert_close(found, patterns.dma_attention(q, k, v, bias, 40, block_q=64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bias": torch.ones(2, 30)},
            ValueError,
            r"bias must have shape \[batch, key heads, tokens\], got \[2, 30\]",
        ),
        (
            {"bias": torch.ones(1, 2, 30).int()},
            TypeError,
            r"bias must have a floating point dtype, got torch\.int32",
        ),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"heads": 3}, ValueError, "heads must be a multiple of bias's 2, got 3"),
        ({"q_len": 31}, ValueError, "q_len must be at most the 30 keys of bias, got 31"),
        ({"block_q": 100}, ValueError, "block_q must be a multiple of 64 from 64 to 2048, got 100"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    given = {"bias": torch.ones(1, 2, 30), "keep": 5, "heads": 4} | change
    with pytest.raises(error, match=message):
        patterns.dma_mask(given.pop("bias"), given.pop("keep"), **given)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"v must have 2 heads of 16, got shape \[1, 5, 2, 8\]"):
        patterns.DMABias(2, 16)(torch.ones(1, 5, 2, 8))
