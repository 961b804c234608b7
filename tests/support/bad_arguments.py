"""Tensors that are good but for one argument, and tables of such cases."""

import pytest
import torch


def tensor(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype)


def qkv(q=(2, 12, 4, 16), k=(2, 12, 2, 16), v=None, dtype=torch.float32):
    return [tensor(*shape, dtype=dtype) for shape in (q, k, v or k)]


def cases(table):
    return pytest.mark.parametrize("case", table.values(), ids=table)
