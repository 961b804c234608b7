"""Gradients of stripes by copies of the listed keys, on the emulator."""

import pytest
import threshold_cases
import torch
from bias_cases import FORMS, biased
from gathered_cases import CASES
from gradient_rule import assert_as_good_as_torch, output_gradients
from poison import poisoned

import sparse_fmha
from sparse_fmha import _C

BF16 = torch.bfloat16


def is_gathered(arguments):
    columns, starts = arguments["columns"], arguments["range_starts"]
    listed = columns.shape[-1] + (0 if starts is None else starts.shape[-1] * 64)
    keys = arguments["k"].shape[1]
    why = _C.tiles.why_not_gathered(arguments["block_q"], min(listed, keys), keys)
    return why is None


def check(case, arguments, **wanted):
    __tracebackhide__ = True
    assert is_gathered(arguments)
    with sparse_fmha.arch_override("sm90"):
        out, lse = case.forward(arguments)
        dout, _ = output_gradients(out, lse)
        with poisoned():
            found = case.backward(arguments, out, lse, dout, **wanted)
    assert_as_good_as_torch(case, arguments, found, dout, lse)
    return found


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_those_of_torch(name, deterministic, dim):
    check(CASES[name], CASES[name].arguments(BF16, dim=dim), deterministic=deterministic)


@pytest.mark.parametrize("dims", [(40, 64), (64, 24)], ids=str)
def test_head_dims_that_rows_do_not_have(dims):
    dim, value_dim = dims
    case = CASES["causal"]
    check(case, case.arguments(BF16, dim=dim, value_dim=value_dim))


def test_gradients_of_keys_alone():
    case = CASES["columns"]
    arguments = case.arguments(BF16, dim=128)
    wanted = {"deterministic": True}
    all_of_them = check(case, arguments, **wanted)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    found = case.backward(arguments, out, lse, dout, need_dq=False, **wanted)
    for name in "kv":
        assert torch.equal(found[name], all_of_them[name]), name


@pytest.mark.parametrize("name", CASES)
def test_biases_of_keys(name):
    form = FORMS[list(CASES).index(name) % len(FORMS)]
    check(*biased(CASES[name], form, BF16, dim=64))


@pytest.mark.parametrize("form", threshold_cases.FORMS)
def test_thresholds_of_rows(form):
    case, arguments = threshold_cases.limited(CASES["causal"], form, BF16, dim=64)
    assert is_gathered(arguments)
    with sparse_fmha.arch_override("sm90"):
        threshold_cases.check(case, arguments)


def test_soft_cap():
    case = CASES["causal"]
    check(case, case.arguments(BF16, dim=64) | {"softcap": 3.0})
