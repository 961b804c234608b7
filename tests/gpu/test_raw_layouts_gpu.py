"""Every tensor argument of every raw op on the GPU, wherever it lies: as tests/test_layouts.py."""

import pytest
import torch
from layouts import amid, at_offset, between, with_gaps
from op_calls import op_calls

pytestmark = pytest.mark.gpu

OPS = op_calls()
ARGUMENTS = [(op, name) for op, call in OPS.items() for name in call.tensors()]
arguments = pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=map("-".join, ARGUMENTS))


@pytest.fixture(scope="module")
def calls(cuda):
    return op_calls(cuda, torch.bfloat16)


@arguments
@pytest.mark.parametrize("elements", [1, 2, 3, 5, 8])
def test_storage_offsets(calls, op, name, elements):
    calls[op].same(**{name: at_offset(calls[op].arguments[name], elements)})


@arguments
def test_gaps_between_entries(calls, op, name):
    tensor = calls[op].arguments[name]
    for dim in range(tensor.dim()):
        if tensor.shape[dim] > 1:
            calls[op].same_or_refused(name, with_gaps(tensor, dim))


@arguments
def test_stride_zero(calls, op, name):
    call = calls[op]
    tensor = call.arguments[name]
    for dim in range(tensor.dim() - 1):
        expanded = tensor.narrow(dim, 0, 1).expand_as(tensor)
        plain = type(call)(call.op, {**call.arguments, name: expanded.contiguous()})
        plain.same_or_refused(name, expanded)


@pytest.mark.parametrize("op", OPS)
def test_what_lies_around_tensors_is_not_read(calls, op):
    """NaN around each operand on every axis; around lists, indices far out of range."""
    operands, lists = {}, {}
    for name, tensor in calls[op].tensors().items():
        if tensor.is_floating_point():
            around = between if tensor.dim() < 4 else amid
            operands[name] = around(tensor, float("nan"))
        else:
            lists[name] = between(tensor, torch.iinfo(tensor.dtype).max)
    calls[op].same(**operands)
    calls[op].same(**lists)
