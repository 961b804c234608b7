"""Packed sequences as a part of PyTorch: tracing, compiling, autocast, and CUDA without a GPU."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.config
from packed_cases import Packed, in_pages
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_fmha
from sparse_fmha import varlen_attention, varlen_neighborhood_attention
from sparse_fmha.varlen.gradients import backward_over_lists

OPS = torch.ops.sparse_fmha
CASE = Packed(lengths=((33, 40, 30), (0, 3, 3), (7, 2, 2)), causal=True, counts_used=True, after=2)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def over_lists(monkeypatch):
    """What CUDA tensors do, on the CPU."""
    monkeypatch.setattr(sparse_fmha.varlen.sequences, "_runs_over_lists", lambda q, is_plain: True)


def finite(case=CASE, dtype=torch.float32):
    """The arguments without NaN, which opcheck cannot compare."""
    given, _ = case.arguments(dtype)
    return {**given, **{x: given[x].nan_to_num(0) for x in "qkv"}}


def test_opcheck():
    given = finite(dtype=torch.bfloat16)
    for x in "qkv":
        given[x].requires_grad_()
    torch.library.opcheck(OPS.varlen_fwd, (), given)
    out, lse = OPS.varlen_fwd(**given)
    arguments = {**given, "dout": out, "dlse": lse.nan_to_num(0, 0, 0), "out": out, "lse": lse}
    arguments = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    for need in ({}, {"need_dq": False}, {"need_dkv": False}):
        torch.library.opcheck(OPS.varlen_bwd, (), {**arguments, **need})


def test_opcheck_of_pages_and_thresholds():
    paged = in_pages(finite(), 16)
    paged |= {x: paged[x].nan_to_num(0) for x in "kv"}
    threshold = torch.tensor([0.1, 0.0, 0.2])
    torch.library.opcheck(OPS.varlen_fwd, (), {**paged, "skip_threshold": threshold})


def layer(x, weight, sink, cu, **options):
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 16)).unbind(-3)
    bounds = len(x), len(x)
    out, lse = varlen_attention(q, k, v, cu, cu, *bounds, sink=sink, return_lse=True, **options)
    return out.flatten(-2) * 2, lse + 1


def grid_layer(x, weight, _sink, _cu, **options):
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 16)).unbind(-3)
    grids = [(3, 5), (3, 5), (len(x) - 30,)]
    out, lse = varlen_neighborhood_attention(q, k, v, grids, 3, return_lse=True, **options)
    return out.flatten(-2) * 2, lse + 1


@pytest.mark.parametrize("function", [layer, grid_layer])
def test_compiled(randn, function):
    x, weight, sink = randn(60, 64), randn(64, 192, seed=1) / 8, randn(4, seed=2)
    cu = torch.tensor([0, 20, 21, 58], dtype=torch.int32)
    inputs = [t.requires_grad_() for t in (x, weight, sink)]
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out, lse = call(*inputs, cu, causal=True)
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, inputs, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_serves_all_lengths(randn):
    weight, sink = randn(64, 192, seed=1) / 8, randn(4, seed=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (40, 75, 130):
        x = randn(tokens, 64, seed=tokens)
        cu = torch.tensor([0, 20, tokens - 3], dtype=torch.int32)
        for a, b in zip(compiled(x, weight, sink, cu), layer(x, weight, sink, cu), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_exported_for_any_number_of_sequences_and_tokens():
    class Layer(torch.nn.Module):
        def forward(self, q, k, cu, sink):
            return varlen_attention(q, k, k, cu, cu, 40, 40, causal=True, sink=sink)

    def arguments(lengths):
        cu, tokens = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths)
        return torch.randn(tokens, 4, 16), torch.randn(tokens, 2, 16), cu, torch.randn(4)

    tokens, entries = torch.export.Dim("tokens", min=2), torch.export.Dim("entries", min=3)
    shapes = {0: tokens}, {0: tokens}, {0: entries}, {}
    program = torch.export.export(Layer(), arguments([30, 10, 5]), dynamic_shapes=shapes).module()
    for lengths in ([30, 40], [1, 0, 7, 2, 40], [3] * 20):
        given = arguments(lengths)
        assert program(*given).equal(Layer()(*given))


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_compiled_with_bounds_that_only_a_run_knows():
    def packed(q, cu):
        longest = cu.diff().max().item()
        return varlen_attention(q, q, q, cu, cu, longest, longest)

    q, cu = torch.randn(70, 4, 16), torch.tensor([0, 30, 70]).int()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert compiled(q, cu).equal(packed(q, cu))


def test_autocast():
    given = finite()
    cast = {**given, **{x: given[x].bfloat16() for x in "qkv"}}
    expected = varlen_attention(**cast)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(**given)
        into = varlen_attention(**given, out=torch.empty_like(expected))
    assert out.dtype == torch.bfloat16
    assert out.equal(expected)
    assert into.equal(expected)


def paged_or_not(paged, dtype=torch.float32):
    given = finite(dtype=dtype)
    if paged:
        given = in_pages(given, 16)
        given |= {x: given[x].nan_to_num(0) for x in "kv"}
    return given


@pytest.mark.parametrize("paged", [False, True])
def test_the_way_over_lists_reads_no_values(over_lists, paged):
    """So it waits for no device, and can be captured."""
    given = paged_or_not(paged, torch.bfloat16)
    with FakeTensorMode() as mode:
        given = {n: mode.from_tensor(x) if torch.is_tensor(x) else x for n, x in given.items()}
        out, lse = varlen_attention(**given, return_lse=True)
    assert (out.shape, out.dtype) == (given["q"].shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (given["q"].shape[:2], torch.float32)


@pytest.mark.parametrize("paged", [False, True])
def test_the_way_over_lists_compiled(over_lists, paged):
    given = paged_or_not(paged)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(**given, return_lse=True), varlen_attention(**given, return_lse=True), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_what_the_way_over_lists_lacks(over_lists):
    given = finite()
    with pytest.raises(
        NotImplementedError, match="with skip_threshold as a tensor runs on the CPU"
    ):
        varlen_attention(**given, skip_threshold=torch.rand(3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_the_backward_pass_of_cuda(causal, need):
    """On the CPU, where the op's own kernels say what it has to return."""
    given = finite(replace(CASE, causal=causal))
    out, lse = OPS.varlen_fwd(**given)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    arguments = (dout, dlse, *(given[x] for x in "qkv"), out, lse)
    rest = (given["cu_q"], given["cu_k"], given["max_q"], given["max_k"], causal, None)
    rest = (*rest, given["seqused_k"], None, *need)
    found = backward_over_lists(*arguments, *rest)
    for a, b in zip(found, OPS.varlen_bwd(*arguments, *rest), strict=True):
        torch.testing.assert_close(a, b)
