"""Thousands of drawn calls: with routing or while collecting, torch's own results and errors."""

import contextlib
import warnings

import pytest
import sdpa_calls
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_fmha import route_sdpa
from sparse_fmha.calibration import Calibration

SETS = 3000
torch_sdpa = torch.nn.functional.scaled_dot_product_attention


def outcome(call, mode=None):
    """What a call returns, and the gradients where there are some; or the type that it raises."""
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(call.around())
        if mode is not None:
            stack.enter_context(mode)
        try:
            out = call.through(torch_sdpa)(*call.args, **call.kwargs)
            if isinstance(out, torch.Tensor) and out.requires_grad:
                inputs = [x for x in (*call.args, *call.kwargs.values()) if differentiable(x)]
                return out, torch.autograd.grad(out.sum(), inputs)
        except Exception as error:
            return type(error)
    return out, ()


def differentiable(x):
    return isinstance(x, torch.Tensor) and x.requires_grad


def assert_identical(result, expected):
    if isinstance(expected, type):
        assert result == expected
        return
    assert not isinstance(result, type), result
    for a, b in zip((result[0], *result[1]), (expected[0], *expected[1]), strict=True):
        assert type(a) is type(b)
        if a is None:
            continue
        assert (a.dtype, a.device, a.layout) == (b.dtype, b.device, b.layout)
        assert a.requires_grad == b.requires_grad
        if a.is_nested:
            torch.testing.assert_close(a.values(), b.values(), rtol=0, atol=0, equal_nan=True)
        elif a.device.type == "meta":
            assert a.shape == b.shape
        else:
            torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)


def assert_as_good(result, expected, call):
    """At most twice torch's error against fp64, and what rounding makes unavoidable."""
    assert not isinstance(expected, type), expected
    assert not isinstance(result, type), result
    for out, theirs in zip((result[0], *result[1]), (expected[0], *expected[1]), strict=True):
        assert type(out) is type(theirs)
        assert (out.shape, out.dtype) == (theirs.shape, theirs.dtype)
    out = result[0]
    if not out.numel():
        return
    exact, exact_grads, (scores, largest_v, largest) = in_fp64(call, out.dtype, bool(result[1]))
    narrow = torch.finfo(out.dtype).eps
    eps = torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
    floors = [2 * narrow * exact.abs().max() + eps * (1 + scores) * largest_v]
    # Gradients are differences of sums over the head dim, in which the rounded result takes part.
    floors += [(4 * narrow + eps * (1 + scores)) * largest for _ in exact_grads]
    exacts = (exact, *exact_grads)
    for found, theirs, true, floor in zip(
        (out, *result[1]), (expected[0], *expected[1]), exacts, floors, strict=True
    ):
        assert found.isfinite().all()
        error, allowed = ((x.double() - true).abs().max() for x in (found, theirs))
        assert error <= 2 * allowed + floor


def in_fp64(call, dtype, differentiated):
    """The result and its gradients; the largest score, value and part of a gradient."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    recorded = []
    for name in names[:3]:  # in the dtype that autocast had made
        wide = given[name].detach().as_subclass(torch.Tensor).to(dtype).double()
        if given[name].requires_grad:
            recorded.append(wide.requires_grad_())
        given[name] = wide
    q, k, v = (given[name].detach() for name in names[:3])
    of_q, of_k, of_v = (x.abs().max() if x.numel() else torch.zeros(()) for x in (q, k, v))
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch_sdpa(**given)
    grads = torch.autograd.grad(exact.sum(), recorded) if differentiated else ()
    part = of_v * q.shape[-1] * max(of_q, of_k) * scale * q.shape[-2]
    return exact.detach(), grads, (of_q * of_k * q.shape[-1] * scale, of_v, q.shape[-2] + part)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about nested tensors and slow transforms
        yield


def test_routed_calls():
    routed, left, raised, reasons = 0, 0, 0, set()
    for seed in range(SETS):
        call = sdpa_calls.draw(seed)
        expected = outcome(call)
        routes = route_sdpa()
        result = outcome(call, routes)
        try:
            if routes.routed:
                assert_as_good(result, expected, call)
            else:
                assert_identical(result, expected)
        except AssertionError as error:
            error.add_note(f"draw({seed}): {call.notes} {routes}")
            raise
        routed += routes.routed
        left += routes.left.total()
        raised += isinstance(expected, type)
        reasons |= {reason.split(";")[0] for reason in routes.left}
    assert routed > SETS * 0.4, "most ordinary calls are routed"
    assert left > SETS * 0.2
    assert raised > SETS * 0.05
    assert len(reasons) > 50


def test_measured_calls():
    measured, passed_over = 0, 0
    for seed in range(SETS // 4):
        call = sdpa_calls.draw(seed)
        expected = outcome(call)
        calibration = Calibration(thresholds=(0.01, 0.5))
        with calibration.collecting() as collector:
            result = outcome(call)
        try:
            assert_identical(result, expected)
        except AssertionError as error:
            error.add_note(f"draw({seed}): {call.notes}")
            raise
        assert len(calibration.points) == 2 * collector.measured
        measured += collector.measured
        passed_over += collector.passed_over.total()
    assert measured > SETS // 4 * 0.25
    assert passed_over > SETS // 4 * 0.2
