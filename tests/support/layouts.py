"""Other places in memory for the same values."""

import torch


def at_offset(tensor, elements):
    """A copy that begins `elements` elements behind the beginning of its storage."""
    storage = tensor.new_empty(elements + tensor.numel())
    return storage[elements:].view(tensor.shape).copy_(tensor)


def at_byte(tensor, byte):
    """A copy on the CPU that begins `byte` bytes behind a multiple of 64, aligned or not."""
    size = tensor.numel() * tensor.element_size()
    memory = bytearray(size + 128)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64 + byte
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    assert view.data_ptr() % 64 == byte
    view.copy_(tensor.flatten())
    return view.view(tensor.shape)


def negated(tensor):
    """The same values behind torch's lazy negation, as the imaginary part of a conjugate has it."""
    return torch._neg_view(-tensor)


def with_gaps(tensor, dim):
    """The same values with another one behind each entry of a dimension."""
    return torch.stack((tensor, torch.ones_like(tensor)), dim + 1).select(dim + 1, 0)


def amid(tensor, fill):
    """A view of a larger tensor that holds `fill` all around it: on every axis, and far behind."""
    margins = [(1, 2)] * (tensor.dim() - 3) + [(2, 150), (1, 2), (8, 16)]
    sizes = [a + n + b for n, (a, b) in zip(tensor.shape, margins, strict=True)]
    view = tensor.new_full(sizes, fill)
    for dim, (before, _) in enumerate(margins):
        view = view.narrow(dim, before, tensor.shape[dim])
    return view.copy_(tensor)


def between(tensor, fill):
    """A contiguous tensor with `fill` before and after it in its storage."""
    storage = tensor.new_full((tensor.numel() + 2048,), fill)
    return storage[1024 : 1024 + tensor.numel()].view(tensor.shape).copy_(tensor)
