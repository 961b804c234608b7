"""Every tensor argument of every raw op on the GPU, wherever it lies; tests/ops has the CPU's."""

import pytest
import torch
from layouts import at_offset
from op_calls import op_calls

pytestmark = pytest.mark.gpu

OPS = op_calls()
CPU_ONLY = {"key_bias"}  # arguments that kernels for GPUs do not take
ARGUMENTS = [
    (op, name) for op, call in OPS.items() for name in call.tensors() if name not in CPU_ONLY
]
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
    calls[op].same_with_gaps(name)


@arguments
def test_stride_zero(calls, op, name):
    calls[op].same_expanded(name)


@pytest.mark.parametrize("op", OPS)
def test_what_lies_around_tensors_is_not_read(calls, op):
    calls[op].same_amid_others()
