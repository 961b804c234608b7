"""Gradients of stripes by copies of the listed keys, on Hopper."""

import other_archs
import pytest
import threshold_cases
import torch
from bias_cases import FORMS, biased
from gathered_cases import CASES
from gradient_rule import assert_as_good_as_torch, output_gradients
from poison import poisoned
from torch.profiler import ProfilerActivity, profile

import sparse_fmha
from sparse_fmha import StripeMask

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def on_hopper():
    if other_archs.in_use() != "sm90":
        pytest.skip("other GPUs copy no keys")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@cases
def test_errors_are_at_most_twice_those_of_torch(cuda, name, dtype, dim, deterministic):
    case = CASES[name]
    arguments = case.arguments(dtype, cuda, dim)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout, deterministic=deterministic)
    assert_as_good_as_torch(case, arguments, found, dout, lse)


@pytest.mark.parametrize("dim", [64, 128, 256])
@cases
def test_biases_of_keys(cuda, name, dim):
    form = FORMS[list(CASES).index(name) % len(FORMS)]
    case, arguments = biased(CASES[name], form, BF16, device=cuda, dim=dim)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout)
    assert_as_good_as_torch(case, arguments, found, dout, lse)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("form", threshold_cases.FORMS)
def test_thresholds_of_rows(cuda, form, dim):
    """Above head dim 128 without copies."""
    case, arguments = threshold_cases.limited(CASES["causal"], form, BF16, device=cuda, dim=dim)
    threshold_cases.check(case, arguments)


@pytest.mark.parametrize(("dim", "deterministic"), [(128, False), (128, True), (256, False)])
def test_kernels_of_a_call(cuda, dim, deterministic):
    case = CASES["causal"]
    arguments = case.arguments(BF16, cuda, dim)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        case.backward(arguments, out, lse, dout, deterministic=deterministic)
        torch.cuda.synchronize()
    names = [event.key for event in found.key_averages()]
    assert not any("Stripe" in name and "attention_kernel" in name for name in names), names
    for part in ("gather_blocks", "add_rows"):
        assert sum(part in name for name in names) == 1, names


@pytest.mark.parametrize("dim", [64, 128, 256])
@cases
def test_twenty_runs_give_the_same_bits(cuda, name, dim):
    case = CASES[name]
    arguments = case.arguments(BF16, cuda, dim)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    first, *others = (
        case.backward(arguments, out, lse, dout, deterministic=True) for _ in range(20)
    )
    for found in others:
        for of, gradient in found.items():
            assert torch.equal(gradient, first[of]), of


def test_a_graph_follows_its_lists(cuda):
    """Capture fails if the host waits; a replay reads lists that changed."""
    case = CASES["columns"]
    arguments = case.arguments(BF16, cuda, 128)
    counts = arguments["counts"].clone()
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)

    def run():
        return case.backward(arguments, out, lse, dout, deterministic=True)

    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for share in (2, 1):
        arguments["counts"].copy_(counts // share)
        for x, now in zip((out, lse), case.forward(arguments), strict=True):
            x.copy_(now)
        graph.replay()
        for of, gradient in run().items():
            assert torch.equal(found[of], gradient), of
        assert_as_good_as_torch(case, arguments, found, dout, lse)


def test_parts_give_the_bits_of_their_heads(cuda):
    """Copies of all heads take more memory than there may be at a time."""
    length, heads, block_q, listed = 16384, 20, 512, 2048
    generator = torch.Generator(cuda).manual_seed(3)
    scores = torch.rand(1, heads, length // block_q, length, generator=generator, device=cuda)
    columns = scores.topk(listed).indices.int().sort().values
    del scores
    counts = columns.new_full(columns.shape[:3], listed)
    shape = 1, length, heads, 128
    q, k, v, dout = (torch.randn(shape, generator=generator, device=cuda).to(BF16) for _ in "qkvo")

    def gradients(first, end):
        own = [x[:, :, first:end].detach().requires_grad_() for x in (q, k, v)]
        lists = columns[:, first:end].contiguous(), counts[:, first:end].contiguous()
        mask = StripeMask(*lists, length, length, block_q)
        torch.use_deterministic_algorithms(True)
        try:
            out = sparse_fmha.stripe_attention(*own, mask)
            return torch.autograd.grad(out, own, dout[:, :, first:end])
        finally:
            torch.use_deterministic_algorithms(False)

    whole = gradients(0, heads)
    for head in (0, 9, 10, 19):
        for found, alone in zip(whole, gradients(head, head + 1), strict=True):
            assert torch.equal(found[:, :, head : head + 1], alone), head
