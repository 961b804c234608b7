"""Gradients on the GPU against fp64, for the mechanisms whose backward kernels are there."""

import other_archs
import pytest
import torch
from gradient_cases import LARGE, Case, block_lists, plain, stripe_lists, window
from gradient_oracle import GRADIENTS
from gradient_rule import ZERO, assert_as_good_as_torch, output_gradients
from poison import poisoned
from torch.profiler import ProfilerActivity, profile

from sparse_fmha import _C

pytestmark = pytest.mark.gpu

DIMS = (32, 64, 72, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
PASSES = ("backward_dq", "backward_dkv")  # deterministic
FUSED = "backward_fused"
# A scale of 0, queries that see fewer than 512 keys, and blocks of fewer than 128.
TWO_KERNELS = {"dense, a scale of 0", "1-D", "2-D", "2-D, dilation", "3-D", "3-D, aligned"}
TWO_KERNELS |= {x for x in LARGE if x.startswith("blocks") and "x128" not in x}
large = pytest.mark.parametrize("name", LARGE)
of_pass = pytest.mark.parametrize("passes", PASSES)
of_any_pass = pytest.mark.parametrize("passes", [*PASSES, FUSED])


def skip_without_kernel(name, passes, dtype, dim):
    """Where the registry has no row for the pass; nothing else is a reason."""
    case = LARGE[name]
    mechanism = case.mechanism
    if mechanism == "fmha":
        mechanism = "causal" if case.options("cpu").get("causal") else "dense"
    request = {"mechanism": mechanism, "dtype": str(dtype).removeprefix("torch."), "head_dim": dim}
    arch = other_archs.in_use()
    for one in [passes] if isinstance(passes, str) else passes:
        try:
            _C.find_kernel(arch=arch, **request, **{"pass": one})
        except RuntimeError as miss:
            pytest.skip(str(miss).partition(";")[0])


def wanted(passes):
    return {"need_dq": passes != "backward_dkv", "need_dkv": passes != "backward_dq"}


def of(found, passes):
    names = {"backward_dq": GRADIENTS[:1], "backward_dkv": GRADIENTS[1:], FUSED: GRADIENTS}[passes]
    return {name: found[name] for name in names if name in found}


@of_any_pass
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@large
def test_errors_are_at_most_twice_those_of_torch(cuda, name, dtype, dim, passes):
    skip_without_kernel(name, passes, dtype, dim)
    case = LARGE[name]
    arguments = case.arguments(dtype, cuda, dim)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout, **wanted(passes))
    assert_as_good_as_torch(case, arguments, of(found, passes), dout, lse)


@of_any_pass
@large
def test_gradients_of_lse(cuda, name, passes):
    """As on the CPU, which tests hold to fp64; to the rounding of bf16."""
    skip_without_kernel(name, passes, torch.bfloat16, 64)
    case = LARGE[name]
    arguments = case.arguments(torch.bfloat16, cuda, 64)
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    found = of(case.backward(arguments, out, lse, dout, dlse, **wanted(passes)), passes)
    there = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    expected = case.backward(there, out.cpu(), lse.cpu(), dout.cpu(), dlse.cpu(), **wanted(passes))
    for n, gradient in found.items():
        size = expected[n].float().abs().max().item() + ZERO
        torch.testing.assert_close(gradient.cpu(), expected[n], rtol=2e-2, atol=1e-2 * size)


@of_pass
@pytest.mark.parametrize("dim", [64, 128])
@large
def test_twenty_runs_give_the_same_bits(cuda, name, dim, passes):
    skip_without_kernel(name, passes, torch.bfloat16, dim)
    case = LARGE[name]
    arguments = case.arguments(torch.bfloat16, cuda, dim)
    out, lse = case.forward(arguments)
    given = out, lse, *output_gradients(out, lse)
    first = of(case.backward(arguments, *given, **wanted(passes)), passes)
    for run in range(20):
        with poisoned():
            again = of(case.backward(arguments, *given, **wanted(passes)), passes)
        for n, gradient in first.items():
            assert gradient.equal(again[n]), (n, run)


# As many tiles as there are thread blocks, so that other work changes which of them run together.
BESIDE_OTHERS = {
    "dense": Case("fmha", (1100,), heads=8, heads_kv=2, batch=2),
    "causal": Case("fmha", (1100,), plain(causal=True), heads=8, heads_kv=2, batch=2),
    "neighborhood": Case("neighborhood", (38, 31), window((21, 26), (3, 1)), heads=8, heads_kv=2),
    "blocks 128x128": Case(
        "block_sparse", (1100,), block_lists(1100, 1100, 128, 128, 8), heads=8, heads_kv=2
    ),
    "blocks 64x64": Case("block_sparse", (900,), block_lists(900, 900, 64, 64, 4), heads=4),
    "stripes": Case("stripe", (1100,), stripe_lists(1100, 1100, 128, 8), heads=8, heads_kv=2),
}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", BESIDE_OTHERS)
def test_a_hundred_runs_beside_other_work_give_the_same_bits(cuda, name, dim):
    case = BESIDE_OTHERS[name]
    arguments = case.arguments(torch.bfloat16, cuda, dim)
    out, lse = case.forward(arguments)
    given = out, lse, *output_gradients(out, lse)
    first = case.backward(arguments, *given, deterministic=True)
    noise, side = torch.randn(2048, 2048, device=cuda), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for run in range(100):
        with torch.cuda.stream(side):
            noise = (noise @ noise).tanh()
        with poisoned():
            again = case.backward(arguments, *given, deterministic=True)
        for n, gradient in first.items():
            assert gradient.equal(again[n]), (n, run)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def autograd_of_a_sum(case, arguments):
    """The gradient of a sum is one number for all: stride 0 in every dimension."""
    tensors = [arguments[n].requires_grad_() for n in GRADIENTS if n in arguments]
    return torch.autograd.grad(case.forward(arguments)[0].sum(), tensors)


@large
def test_autograd_runs_these_kernels(cuda, deterministic, name):
    skip_without_kernel(name, PASSES, torch.bfloat16, 64)
    case = LARGE[name]
    arguments = case.arguments(torch.bfloat16, cuda, 64)
    out, lse = case.forward(arguments)
    expected = case.backward(arguments, out, lse, torch.ones_like(out), deterministic=True)
    found = autograd_of_a_sum(case, arguments)
    for gradient, one in zip(found, expected.values(), strict=True):
        assert gradient.equal(one)


@pytest.mark.parametrize("dim", [64, 128])
@large
def test_autograd_runs_one_kernel_where_bits_may_vary(cuda, name, dim):
    skip_without_kernel(name, FUSED, torch.bfloat16, dim)
    case = LARGE[name]
    arguments = case.arguments(torch.bfloat16, cuda, dim)
    out, lse = case.forward(arguments)
    expected = case.backward(arguments, out, lse, torch.ones_like(out))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        found = autograd_of_a_sum(case, arguments)
        torch.cuda.synchronize()
    kernels = [x.key for x in recorded.key_averages()]
    fused = name not in TWO_KERNELS
    assert any("round_sums" in x for x in kernels) == fused, kernels
    for gradient, one in zip(found, expected.values(), strict=True):
        size = one.float().abs().max().item()
        torch.testing.assert_close(gradient, one, rtol=2e-2, atol=4e-3 * size)


@of_pass
@pytest.mark.parametrize("name", ["causal", "2-D", "blocks 128x128", "stripes"])
def test_layouts_of_gradients(cuda, name, passes):
    skip_without_kernel(name, passes, torch.bfloat16, 64)
    case = LARGE[name]
    arguments = case.arguments(torch.bfloat16, cuda, 64)
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    layouts = (
        dout.movedim(-2, 1).contiguous().movedim(1, -2),
        dout.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.cat([dout, torch.full_like(dout, torch.nan)], -1)[..., : dout.shape[-1]],
        dout[..., :1, :].expand_as(dout),
    )
    for strided in layouts:
        found = case.backward(arguments, out, lse, strided, dlse, **wanted(passes))
        plain = case.backward(arguments, out, lse, strided.contiguous(), dlse, **wanted(passes))
        for n, gradient in of(found, passes).items():
            assert gradient.equal(plain[n]), n


@pytest.mark.parametrize("name", ["dense", "2-D", "blocks 128x128", "stripes"])
def test_what_has_no_kernel_says_so(cuda, name):
    """fp32 has none on the GPU: neither forward nor backward."""
    case = LARGE[name]
    arguments = case.arguments(torch.float32, cuda, 64)
    out = torch.zeros_like(arguments["q"])
    lse = out[..., 0].contiguous()
    with pytest.raises(
        RuntimeError, match=r"^NotImplementedError: sparse_fmha: no kernel for arch="
    ):
        case.backward(arguments, out, lse, out)
