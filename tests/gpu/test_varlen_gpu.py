"""Packed sequences and grids on GPUs; tests/ops has the rest."""

import math
from dataclasses import replace

import pytest
import torch
from gradient_oracle import gradients
from packed_cases import LENGTHS, Packed, clean, in_pages, on_device

from sparse_fmha import neighborhood_attention, varlen_attention, varlen_neighborhood_attention
from sparse_fmha.integrations.torch_varlen import varlen_attn

pytestmark = pytest.mark.gpu

CASES = {
    "dense": Packed(lengths=LENGTHS, dim=64),
    "causal": Packed(lengths=LENGTHS, dim=128, causal=True, before=3, after=200),
    "keys in use": Packed(lengths=LENGTHS, dim=64, causal=True, counts_used=True, after=1),
    "one sequence": Packed(lengths=((700, 1000, 1000),), dim=128, causal=True),
    "short ones": Packed(lengths=((5, 5, 5),) * 100, dim=64, causal=True),
}
cases = pytest.mark.parametrize("name", CASES)


def arguments(name, device):
    given, mask = CASES[name].arguments(torch.bfloat16)
    return on_device(given, device), mask


@cases
def test_every_sequence_is_attention(cuda, agrees, poisoned, name):
    given, mask = arguments(name, cuda)
    with poisoned():
        out, lse = varlen_attention(**given, return_lse=True)
    agrees(out[None], lse[None], *clean(given["q"], given["k"], given["v"]), visible=mask.to(cuda))


@cases
def test_gradients(cuda, name):
    given, _ = arguments(name, cuda)
    inputs = [given[x].requires_grad_() for x in "qkv"]
    out, lse = varlen_attention(**given, return_lse=True)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    found = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    known = {x: given[x].detach().nan_to_num(0) for x in "qkv"}
    expected = gradients("varlen", {**given, **known}, dout, dlse)
    for x, gradient in zip("qkv", found, strict=True):
        error = (gradient.double() - expected[x]).abs().max()
        assert error <= 0.02 * expected[x].abs().max()


def test_lengths_change_between_replays(cuda):
    """Of a captured call, within the bounds."""
    case = Packed(lengths=((300, 300, 300), (100, 100, 100), (212, 212, 212)), dim=64)
    given, _ = case.arguments(torch.bfloat16)
    given = on_device(given, cuda)
    given |= {"cu_k": given["cu_q"], "max_q": 400, "max_k": 400, "causal": True}
    varlen_attention(**given)  # what is allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = varlen_attention(**given, return_lse=True)
    for starts in ((0, 300, 400, 612), (0, 1, 2, 350), (5, 200, 200, 600)):
        given["cu_q"].copy_(torch.tensor(starts))
        graph.replay()
        expected = varlen_attention(**given, return_lse=True)
        for a, b in zip((out, lse), expected, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [1, 16, 64, 100])
@pytest.mark.parametrize("missing", [False, True])
@cases
def test_keys_in_pages(cuda, agrees, poisoned, name, missing, page, dim):
    case = replace(CASES[name], dim=dim)
    given, mask = case.arguments(torch.bfloat16)
    paged = in_pages(given, page)
    if missing:  # the second page of every sequence
        for b, first in enumerate(case.starts(1)[:-1].tolist()):
            if paged["page_table"].shape[1] > 1:
                paged["page_table"][b, 1] = 10**6
                own = slice(int(case.starts(0)[b]), int(case.starts(0)[b + 1]))
                mask[own, first + page : first + 2 * page] = False
    with poisoned():
        out, lse = varlen_attention(**on_device(paged, cuda), return_lse=True)
    inputs = (x.to(cuda) for x in clean(given["q"], given["k"], given["v"]))
    agrees(out[None], lse[None], *inputs, visible=mask.to(cuda))


def test_pages_and_lengths_change_between_replays(cuda):
    case = Packed(lengths=((300, 900, 900), (100, 100, 100), (212, 300, 280)), dim=64, causal=True)
    paged = on_device(in_pages(case.arguments(torch.bfloat16)[0], 16), cuda)
    paged |= {x: paged[x].nan_to_num(0.5) for x in "kv"}
    paged |= {"max_q": 400, "max_k": 900}
    varlen_attention(**paged)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = varlen_attention(**paged, return_lse=True)
    table = paged["page_table"]
    for starts, used in (((0, 300, 400, 612), (900, 3, 0)), ((0, 1, 2, 350), (17, 800, 350))):
        paged["cu_q"].copy_(torch.tensor(starts))
        paged["seqused_k"].copy_(torch.tensor(used))
        table.copy_(table.flatten()[torch.randperm(table.numel(), device=cuda)].view_as(table))
        graph.replay()
        expected = varlen_attention(**paged, return_lse=True)
        for a, b in zip((out, lse), expected, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0), (40, 30)])
def test_windows_over_pages(cuda, window):
    """As on the CPU, up to rounding."""
    case = Packed(lengths=((300, 900, 900), (1, 100, 100), (212, 300, 280)), dim=128)
    paged = in_pages(case.arguments(torch.float16)[0], 16)
    places = ("q", "k", "v", "cu_q", "cu_k", "max_q", "max_k")

    def run(given):
        rest = {"seqused_k": given["seqused_k"], "block_table": given["page_table"]}
        return varlen_attn(*(given[x] for x in places), window_size=window, enable_gqa=True, **rest)

    torch.testing.assert_close(run(on_device(paged, cuda)).cpu(), run(paged), rtol=0.01, atol=2e-3)


@pytest.mark.parametrize("option", ["skip_threshold", "softcap"])
def test_what_the_op_lacks(cuda, option):
    given, _ = Packed(lengths=((9, 30, 30),), dim=64).arguments(torch.bfloat16)
    value = torch.zeros(1, device=cuda) if option == "skip_threshold" else 30.0
    with pytest.raises(RuntimeError, match=f"varlen_fwd with {option} runs on the CPU only"):
        torch.ops.sparse_fmha.varlen_fwd(**on_device(given, cuda), **{option: value})


def test_packed_grids(randn):
    grids = [(12, 16), (12, 16), (7, 30), (200,)]
    inputs = [
        randn(sum(map(math.prod, grids)), heads, 64, seed=i).requires_grad_()
        for i, heads in enumerate((4, 2, 2))
    ]
    out = varlen_neighborhood_attention(*inputs, grids, 7)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, dout)
    first, parts = 0, []
    for grid in grids:
        own = slice(first, first + math.prod(grid))
        first = own.stop
        tensors = (x[own].unflatten(0, grid)[None] for x in inputs)
        parts.append(neighborhood_attention(*tensors, 7).flatten(0, -3))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_packed_grids_in_a_graph(cuda):
    """Its calls are branches, which meet before what follows."""
    grids = [(9, 7), (40, 30), (40, 30), (5, 90), (300, 4), (17, 17), (64, 64)]
    tokens = sum(height * width for height, width in grids)
    q, k, v = (torch.randn(tokens, 4, 128, dtype=torch.bfloat16, device=cuda) for _ in range(3))
    given = (q, k, v, grids, (4, 4))
    with torch.no_grad():
        varlen_neighborhood_attention(*given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = varlen_neighborhood_attention(*given, return_lse=True)
            doubled = out * 2
        for _ in range(20):
            q.normal_()
            graph.replay()
            exact, exact_lse = varlen_neighborhood_attention(*given, return_lse=True)
            assert out.equal(exact)
            assert lse.equal(exact_lse)
            assert doubled.equal(exact * 2)
