"""Gradients of calls with a bias of keys on the GPU, and those of the bias itself."""

from dataclasses import replace

import pytest
import torch
from bias_cases import FORMS, biased
from gradient_cases import LARGE, Case, values, window
from gradient_rule import ZERO, assert_as_good_as_torch, output_gradients
from poison import poisoned

import sparse_fmha

pytestmark = pytest.mark.gpu

INF = float("inf")
BF16 = torch.bfloat16
large = pytest.mark.parametrize("name", LARGE)
# One of each way to find and load keys.
MECHANISMS = ["dense", "causal", "1-D", "2-D, dilation", "blocks 64x64, causal", "stripes"]
mechanisms = pytest.mark.parametrize("name", MECHANISMS)
dims = pytest.mark.parametrize("dim", [64, 128, 256])


def form_of(name, dim):
    """The forms take turns."""
    return FORMS[(list(LARGE).index(name) + dim // 8) % 4]


def differentiated(case, arguments, by_lse=False, **wanted):
    """out, lse, their gradients, and the gradients of what is wanted."""
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    by = (dout, dlse if by_lse else None)
    with poisoned():
        found = case.backward(arguments, out, lse, *by, **wanted)
    return out, lse, by, found


def check(case, arguments):
    __tracebackhide__ = True
    _, lse, (dout, _), found = differentiated(case, arguments)
    assert "key_bias" in found
    assert_as_good_as_torch(case, arguments, found, dout, lse)
    return found


@pytest.mark.parametrize("dim", [32, 64, 72, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@large
def test_errors_are_at_most_twice_those_of_torch(cuda, name, dtype, dim):
    check(*biased(LARGE[name], form_of(name, dim), dtype, device=cuda, dim=dim))


@large
def test_gradients_of_lse(cuda, name):
    """As on the CPU, which tests hold to fp64; to the rounding of bf16."""
    case, arguments = biased(LARGE[name], "batch, heads", BF16, device=cuda, dim=64)
    out, lse, by, found = differentiated(case, arguments, by_lse=True)
    there = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    expected = case.backward(there, *(x.cpu() for x in (out, lse, *by)))
    for n, gradient in found.items():
        size = expected[n].float().abs().max().item() + ZERO
        torch.testing.assert_close(gradient.cpu(), expected[n], rtol=2e-2, atol=1e-2 * size)


@pytest.mark.parametrize("dim", [64, 128, 256])
@mechanisms
def test_twenty_runs_give_the_same_bits(cuda, name, dim):
    case, arguments = biased(LARGE[name], "batch, heads", BF16, device=cuda, dim=dim)
    *_, first = differentiated(case, arguments, by_lse=True)
    for run in range(20):
        *_, again = differentiated(case, arguments, by_lse=True)
        for n, gradient in first.items():
            assert gradient.equal(again[n]), (n, run)


@dims
@mechanisms
def test_only_what_is_wanted(cuda, name, dim):
    case, arguments = biased(LARGE[name], "batch, heads", BF16, device=cuda, dim=dim)
    *_, whole = differentiated(case, arguments)
    for wanted in ("need_dq", "need_dkv", "need_dbias"):
        flags = dict.fromkeys(("need_dq", "need_dkv", "need_dbias"), False)
        *_, found = differentiated(case, arguments, **{**flags, wanted: True})
        names = {"need_dq": ["q"], "need_dbias": ["key_bias"]}
        names = names.get(wanted, [n for n in whole if n not in ("q", "key_bias")])
        for n, gradient in found.items():
            if n in names:
                assert gradient.equal(whole[n]), n
            else:
                assert gradient.numel() == 0, n


@dims
@mechanisms
def test_padding_that_fills_tiles(cuda, name, dim):
    """Hidden keys have gradients 0, and so have rows whose keys are all hidden."""
    case = replace(LARGE[name], extra=0)
    case, arguments = biased(case, "one head", BF16, hidden=0, device=cuda, dim=dim)
    bias = arguments["key_bias"]
    tokens = bias.shape[2]
    bias[0, :, : tokens // 2 + 7] = -INF
    bias[1] = -INF
    found = check(case, arguments)
    hidden = bias[:, 0] == -INF
    for n in "kv":
        gradient = found[n].flatten(1, -3)
        assert gradient[hidden].eq(0).all(), n
    assert found["key_bias"][:, 0][hidden].eq(0).all()
    assert found["q"][1].eq(0).all()
    assert all(gradient[0].ne(0).any() for gradient in found.values())


@dims
@mechanisms
def test_large_biases_of_all_keys(cuda, name, dim):
    """They cancel, but not in the rows of a tile that the tensor does not have."""
    case, arguments = biased(LARGE[name], "batch, heads", BF16, hidden=0, device=cuda, dim=dim)
    arguments["key_bias"] += 150
    check(case, arguments)


@dims
@mechanisms
@pytest.mark.parametrize("slope", [-3.0, 0.02])
def test_biases_that_rise_or_fall(cuda, name, dim, slope):
    """Where one key has all of a row's weight, what is left of the bias's gradient is rounding."""
    case, arguments = biased(LARGE[name], "one batch entry", BF16, device=cuda, dim=dim)
    bias = arguments["key_bias"]
    bias += slope * torch.arange(bias.shape[2], device=cuda)
    _, lse, (dout, _), found = differentiated(case, arguments)
    if slope < -1:
        assert found.pop("key_bias").isfinite().all()
    assert_as_good_as_torch(case, arguments, found, dout, lse)


@dims
@mechanisms
def test_a_bias_of_zero_changes_little(cuda, name, dim):
    case, arguments = biased(LARGE[name], "one for all", BF16, device=cuda, dim=dim)
    bias = arguments.pop("key_bias")
    *_, expected = differentiated(case, arguments, deterministic=True)
    *_, found = differentiated(case, {**arguments, "key_bias": torch.zeros_like(bias)})
    for n, gradient in expected.items():
        size = gradient.float().abs().max().item()
        torch.testing.assert_close(found[n], gradient, rtol=1e-2, atol=1e-2 * size)


@mechanisms
def test_layouts(cuda, name):
    """Strides of any kind give the bits of the contiguous copy."""
    case, arguments = biased(LARGE[name], "batch, heads", BF16, device=cuda, dim=64)
    bias = arguments["key_bias"]
    gaps = torch.stack([bias, bias], 3)[..., 0]
    heads_last = bias.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (gaps, heads_last, bias[:, :1].expand_as(bias)):
        *_, own = differentiated(case, {**arguments, "key_bias": strided})
        plain = strided.contiguous().clone()
        *_, expected = differentiated(case, {**arguments, "key_bias": plain})
        for n, gradient in expected.items():
            assert gradient.equal(own[n]), n


GRIDS = {  # split into several launches
    "dilation above 8": Case("neighborhood", (23, 50), window((3, 4), 1, (2, 12)), batch=2),
    "3-D, many batch entries": Case("neighborhood", (4, 9, 16), window((2, 4, 7)), batch=8),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", GRIDS)
def test_grids_in_several_launches(cuda, name, dim):
    case = GRIDS[name]
    arguments = case.arguments(BF16, cuda, dim)
    tokens = arguments["k"].shape[1:-2].numel()
    bias = values(case.batch, 2, tokens, seed=3, dtype=torch.float32, device=cuda)
    check(case, arguments | {"key_bias": bias})


def test_keys_that_no_query_sees(cuda):
    """The gradient of their bias is 0, not what memory held."""
    case, arguments = biased(LARGE["stripes"], "batch, heads", BF16, device=cuda, dim=64)
    arguments["counts"] = torch.zeros_like(arguments["counts"])
    arguments["range_counts"] = torch.zeros_like(arguments["range_counts"])
    *_, found = differentiated(case, arguments)
    assert all(gradient.eq(0).all() for gradient in found.values())


def test_public_functions(cuda):
    """With a grid's bias that heads share, GQA and a sink, through autograd."""
    q = values(2, 12, 20, 4, 64, seed=0, dtype=BF16, device=cuda)
    k, v = (values(2, 12, 20, 2, 64, seed=i, dtype=BF16, device=cuda) for i in (1, 2))
    bias = values(2, 1, 12, 20, seed=3, dtype=torch.float32, device=cuda)
    sink = values(4, seed=4, dtype=torch.float32, device=cuda)

    def gradients(*tensors):
        q, k, v, bias, sink = (x.detach().requires_grad_() for x in tensors)
        out = sparse_fmha.neighborhood_attention(q, k, v, (5, 7), key_bias=bias, sink=sink)
        return torch.autograd.grad(out.float().square().sum(), (q, k, v, bias, sink))

    found = gradients(q, k, v, bias, sink)
    expected = gradients(*(x.cpu().float() for x in (q, k, v)), bias.cpu(), sink.cpu())
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        size = exact.abs().max().item()
        torch.testing.assert_close(ours.cpu().float(), exact, rtol=5e-2, atol=2e-2 * size)
