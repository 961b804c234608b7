"""Neighborhoods of packed grids against the definition of each sample."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_fmha
from sparse_fmha import reference, varlen_neighborhood_attention

MIXED = [(4, 6), (4, 6), (3, 2, 5), (17,), (4, 6), (4, 6)]


def qkv(randn, tokens, dtype=torch.float32, heads=(4, 2, 2), dim=16):
    return [randn(tokens, h, dim, seed=i, dtype=dtype) for i, h in enumerate(heads)]


@st.composite
def samples(draw):
    """A grid, and a window, stride, dilation and causal for each of its axes."""
    axes = draw(st.integers(1, 3))
    drawn = []
    for _ in range(axes):
        length = draw(st.integers(1, 9))
        dilation = draw(st.integers(1, min(2, length)))
        window = draw(st.integers(1, length // dilation))
        drawn.append((length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
    return tuple(zip(*drawn, strict=True))


def expected_of(q, k, v, parts, scale=None):
    """out and lse in fp64, sample by sample."""
    results, first = [], 0
    for grid, *parameters in parts:
        own = slice(first, first + math.prod(grid))
        mask = reference.neighborhood_mask(grid, *parameters)
        results.append(reference.attention(q[None, own], k[None, own], v[None, own], mask, scale))
        first = own.stop
    return (torch.cat([x[0] for x in part]) for part in zip(*results, strict=True))


@settings(max_examples=30)
@given(st.lists(samples(), min_size=1, max_size=3), st.sampled_from([1, 2]))
def test_every_sample_is_attention(randn, poisoned, parts, copies):
    parts = [part for part in parts for _ in range(copies)]
    inputs = qkv(randn, sum(math.prod(part[0]) for part in parts), torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    grids, window, stride, dilation, causal = (list(x) for x in zip(*parts, strict=True))
    with poisoned():
        results = varlen_neighborhood_attention(
            *inputs, grids, window, stride=stride, dilation=dilation, causal=causal,
            scale=-0.3, return_lse=True,
        )  # fmt: skip
    assert all(x.is_contiguous() for x in results)
    expected = tuple(expected_of(*inputs, parts, -0.3))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-6, atol=1e-6)
    of_results = [torch.randn_like(x) for x in results]
    found = torch.autograd.grad(results, inputs, of_results)
    wide = [x.double() for x in of_results]
    for a, b in zip(found, torch.autograd.grad(expected, inputs, wide), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_neighbors_of_one_shape_are_one_call(randn, monkeypatch):
    calls = []
    attend = sparse_fmha.varlen.grids.neighborhood_attention

    def counted(q, *args, **kwargs):
        calls.append(tuple(q.shape[:-2]))
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(sparse_fmha.varlen.grids, "neighborhood_attention", counted)
    inputs = [x.requires_grad_() for x in qkv(randn, sum(map(math.prod, MIXED)))]
    recorded = varlen_neighborhood_attention(*inputs, MIXED, 2)
    assert calls == [(2, 4, 6), (1, 3, 2, 5), (1, 17), (2, 4, 6)]
    calls.clear()
    varlen_neighborhood_attention(*inputs, MIXED, [2, 3, 2, 2, 2, 2])
    assert calls == [(1, 4, 6), (1, 4, 6), (1, 3, 2, 5), (1, 17), (2, 4, 6)]
    calls.clear()
    with torch.no_grad():  # each call writes to its part of the result
        assert varlen_neighborhood_attention(*inputs, MIXED, 2).equal(recorded)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parts_of_one_result(randn, poisoned, dtype):
    inputs = qkv(randn, 34 + 9, dtype, heads=(3, 1, 1), dim=8)
    given = ([(17,), (17,), (3, 3)], [5, 9, 3])
    with poisoned():
        found = varlen_neighborhood_attention(*inputs, *given, return_lse=True)
    for x in inputs:
        x.requires_grad_()
    for a, b in zip(
        found, varlen_neighborhood_attention(*inputs, *given, return_lse=True), strict=True
    ):
        assert a.equal(b)


def test_the_op_that_writes(randn):
    q, k, v = qkv(randn, 6)
    shaped = [x.view(1, 6, *x.shape[1:]) for x in (q, k, v)]
    lists = [3], [1], [1], [0]
    out, lse = torch.empty_like(shaped[0]), torch.empty(1, 6, 4)
    op = torch.ops.sparse_fmha.neighborhood_out
    op(*shaped, out, lse, *lists)
    for a, b in zip(
        (out, lse), torch.ops.sparse_fmha.neighborhood_fwd(*shaped, *lists), strict=True
    ):
        assert a.equal(b)
    torch.library.opcheck(op, (*shaped, out, lse, *lists))
    bad = {
        "out must have the result's shape": (out[:, :5], lse),
        "lse must have the result's shape": (out, lse.double()),
        "out must be contiguous, got stride": (torch.empty(1, 6, 4, 32)[..., :16], lse),
    }
    for message, results in bad.items():
        with pytest.raises(RuntimeError, match=message):
            op(*shaped, *results, *lists)
    with pytest.raises(NotImplementedError, match="neighborhood_out has no derivatives"):
        op(shaped[0].requires_grad_(), *shaped[1:], out, lse, *lists)


def test_parameters_for_all_and_for_each(randn):
    inputs = qkv(randn, 48)
    grids = [(4, 6), (6, 4)]
    tuples = varlen_neighborhood_attention(*inputs, grids, (2, 3), causal=(True, False))
    lists = varlen_neighborhood_attention(
        *inputs, grids, [(2, 3)] * 2, stride=[1, (1, 1)], causal=[(True, False)] * 2
    )
    assert tuples.equal(lists)


def test_strided_views(randn):
    packed = randn(34, 3, 2, 16)
    inputs = packed.unbind(1)
    expected = varlen_neighborhood_attention(*(x.contiguous() for x in inputs), [(17,)] * 2, 5)
    assert varlen_neighborhood_attention(*inputs, [(17,)] * 2, 5).equal(expected)


def test_no_samples(randn):
    inputs = [x.requires_grad_() for x in qkv(randn, 0)]
    out, lse = varlen_neighborhood_attention(*inputs, [], 3, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 16), (0, 4))
    assert lse.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), inputs)[0].shape == (0, 4, 16)


BAD = {
    "tokens": (([(4, 6)], 3), {}, ValueError, "grids must have the 30 tokens of q, got 24"),
    "window": (
        ([(4, 6), (3, 2)], (3, 3)),
        {},
        ValueError,
        "sample 1 with the grid [3, 2]: window[1] * dilation[1] must be at most the 2 tokens",
    ),
    "stride": (
        ([(5, 6)], 3),
        {"stride": 4},
        ValueError,
        "sample 0 with the grid [5, 6]: stride[0] must be from 1 to window[0] = 3, got 4",
    ),
    "axes": (
        ([(5, 6)], (3,)),
        {},
        ValueError,
        "sample 0 with the grid [5, 6]: window must have one entry",
    ),
    "entries": (
        ([(5, 6)], [3, 3]),
        {},
        ValueError,
        "window must have one entry for each of the 1 samples, got a list of 2",
    ),
    "type": (
        ([(5, 6)], 3),
        {"causal": [(0, 1)]},
        TypeError,
        "sample 0 with the grid [5, 6]: causal must be a bool or a tuple of them, got (0, 1)",
    ),
    "shape": (([5, 6], 3), {}, ValueError, "grids[0] must be a shape of one to three axes, got 5"),
    "rank": (
        ([(1, 1, 5, 6)], 1),
        {},
        ValueError,
        "grids[0] must be a shape of one to three axes, got (1, 1, 5, 6)",
    ),
    "grids": ((30, 3), {}, TypeError, "grids must be a sequence of shapes, got int"),
    "size": (([(5.0, 6)], 3), {}, TypeError, "an axis of grids[0] must be an int, got 5.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(randn, case):
    args, options, error, message = BAD[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        varlen_neighborhood_attention(*qkv(randn, 30), *args, **options)


def test_other_tensors_are_refused(randn):
    q, k, v = qkv(randn, 30)
    with pytest.raises(ValueError, match=r"^q must have shape \[tokens, heads, head dim\]"):
        varlen_neighborhood_attention(q[None], k, v, [(30,)], 3)
    with pytest.raises(ValueError, match=r"^k must have q's grid, \[30\], got \[29\]"):
        varlen_neighborhood_attention(q, k[1:], v[1:], [(30,)], 3)
