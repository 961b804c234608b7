"""Thresholds of rows on the GPU: lists of blocks and stripes, forward and backward."""

import pytest
import torch
from gradient_cases import LARGE
from gradient_rule import output_gradients
from threshold_cases import FORMS, check, limited

import sparse_fmha
from sparse_fmha import patterns

pytestmark = pytest.mark.gpu

INF = float("inf")
BF16 = torch.bfloat16
LISTS = [name for name, case in LARGE.items() if case.mechanism in ("block_sparse", "stripe")]
lists = pytest.mark.parametrize("name", LISTS)
# Block lists have kernels for thresholds up to head dim 128.
CASES = [(n, d) for n in LISTS for d in (64, 128, 256) if d <= 128 or n.startswith("stripes")]
cases = pytest.mark.parametrize(("name", "dim"), CASES)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@cases
def test_errors_are_at_most_twice_those_of_torch(cuda, name, dim, dtype):
    form = list(FORMS)[(LISTS.index(name) + dim // 64) % 3]
    check(*limited(LARGE[name], form, dtype, seed=dim, device=cuda, dim=dim))


@cases
def test_special_numbers(cuda, name, dim):
    """-inf shows every key that is not hidden, +inf and NaN show none."""
    case, arguments = limited(LARGE[name], "one for all", BF16, device=cuda, dim=dim)
    arguments["key_bias"][..., ::5] = -INF
    threshold = arguments["row_threshold"]
    threshold[..., :70] = -INF
    threshold[..., 70:100] = INF
    threshold[..., 100:200] = float("nan")
    _, lse, found = check(case, arguments)
    assert lse[:, 70:200].eq(-INF).all()
    assert found["q"][:, 70:200].eq(0).all()
    assert found["key_bias"][..., ::5].eq(0).all()


@lists
def test_a_bias_is_compared_as_it_was_given(cuda, name):
    """Numbers next to each other, which are equal once they are scaled to log2 units."""
    case, arguments = limited(LARGE[name], "one for all", BF16, device=cuda, dim=64)
    one = torch.tensor(1.0, device=cuda)
    near = [one, torch.nextafter(one, one + 1), torch.nextafter(one, one - 1)]
    for n in ("key_bias", "row_threshold"):
        places = torch.arange(arguments[n].shape[-1], device=cuda) % 3
        arguments[n].copy_(torch.stack(near)[places])
    check(case, arguments)


@lists
def test_twenty_runs_give_the_same_bits(cuda, name):
    case, arguments = limited(LARGE[name], dtype=BF16, device=cuda, dim=128)
    first = check(case, arguments)
    dout, _ = output_gradients(*first[:2])
    for _ in range(20):
        out, lse = case.forward(arguments)
        assert out.equal(first[0])
        assert lse.equal(first[1])
        found = case.backward(arguments, out, lse, dout)
        assert all(x.equal(first[2][n]) for n, x in found.items())


def test_as_without_where_all_is_seen(cuda):
    """A threshold of -inf changes no bit."""
    for name in LISTS:
        case, arguments = limited(LARGE[name], dtype=BF16, device=cuda, dim=128)
        arguments["row_threshold"].fill_(-INF)
        found = case.forward(arguments)
        del arguments["row_threshold"]
        for a, b in zip(found, case.forward(arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_dma_attention(cuda):
    """Values and the gradient of the bias, beside the CPU in fp32."""
    rng = torch.Generator(cuda).manual_seed(0)
    q = torch.randn(1, 700, 4, 64, device=cuda, dtype=BF16, generator=rng)
    k, v = (torch.randn(1, 700, 2, 64, device=cuda, dtype=BF16, generator=rng) for _ in "kv")
    bias = torch.rand(1, 2, 700, device=cuda, generator=rng).requires_grad_()
    out = patterns.dma_attention(q, k, v, bias, keep=100)
    there = bias.detach().cpu().requires_grad_()
    expected = patterns.dma_attention(*(x.cpu().float() for x in (q, k, v)), there, keep=100)
    torch.testing.assert_close(out.cpu().float(), expected, rtol=2e-2, atol=2e-2)
    by = torch.randn(out.shape, device=cuda, generator=rng)
    out.backward(by.to(BF16))
    expected.backward(by.cpu())
    size = there.grad.abs().max().item()
    torch.testing.assert_close(bias.grad.cpu(), there.grad, rtol=3e-2, atol=2e-2 * size)


def test_block_lists_of_large_heads_raise(cuda):
    case, arguments = limited(LARGE["blocks 64x64, causal"], dtype=BF16, device=cuda, dim=136)
    with pytest.raises(RuntimeError, match="for block lists and head dims above 128; move"):
        case.forward(arguments)


def test_other_architectures_raise(cuda):
    case, arguments = limited(LARGE[LISTS[0]], dtype=BF16, device=cuda, dim=64)
    with (
        sparse_fmha.arch_override("sm80"),
        pytest.raises(RuntimeError, match="row_threshold has no kernels of sm80"),
    ):
        case.forward(arguments)
