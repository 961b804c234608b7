"""Every tensor argument of every raw op, wherever it lies: the same result, or an error by name."""

import pytest
import torch
from layouts import at_byte, at_offset, negated
from op_calls import op_calls

CALLS = op_calls(backward=True, on_cpu_only=True)
ARGUMENTS = [(op, name) for op, call in CALLS.items() for name in call.tensors()]
arguments = pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=map("-".join, ARGUMENTS))


@arguments
@pytest.mark.parametrize("elements", [1, 2, 3, 5, 8])
def test_storage_offsets(op, name, elements):
    CALLS[op].same(**{name: at_offset(CALLS[op].arguments[name], elements)})


@arguments
@pytest.mark.parametrize("byte", [1, 2, 4, 8, 33])
def test_addresses(op, name, byte):
    """Also those that no element of the dtype may have: memory that torch was given."""
    tensor = CALLS[op].arguments[name]
    refused = CALLS[op].same_or_refused(name, at_byte(tensor, byte))
    assert not (refused and byte % tensor.element_size() == 0)


@arguments
def test_lazy_negation(op, name):
    tensor = CALLS[op].arguments[name]
    if tensor.dtype == torch.uint8:
        pytest.skip("bits are not negated")
    CALLS[op].same(**{name: negated(tensor)})


@arguments
def test_gaps_between_entries(op, name):
    CALLS[op].same_with_gaps(name)


@arguments
def test_stride_zero(op, name):
    CALLS[op].same_expanded(name)


@pytest.mark.parametrize("op", CALLS)
def test_what_lies_around_tensors_is_not_read(op):
    CALLS[op].same_amid_others()
