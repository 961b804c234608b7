"""Builders under `torch.set_default_device("cuda")` give what they give without it."""

import pytest
import torch

from benchmarks.studies.builders import CASES
from sparse_fmha import BlockMask
from sparse_fmha.patterns import bigbird, longformer, streaming_llm

pytestmark = pytest.mark.gpu

TOKENS = 2048


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    held = vars(value).values() if hasattr(value, "__dict__") else ()
    held = value if isinstance(value, (tuple, list)) else held
    return [tensor for each in held for tensor in tensors(each)]


@pytest.mark.parametrize("name", CASES)
def test_default_device(cuda, name):
    torch.manual_seed(0)
    make = CASES[name].prepare(TOKENS)
    expected = tensors(make())
    with torch.device(cuda):
        found = tensors(make())
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device
        assert a.equal(b)


@pytest.mark.parametrize("default", ["cpu", "cuda"])
def test_masks_on_the_device_asked_for(cuda, default):
    with torch.device(default):
        masks = [
            streaming_llm(TOKENS, TOKENS, device="cuda"),
            longformer(TOKENS, device="cuda"),
            bigbird(TOKENS, 2, device="cuda"),
        ]
    assert {mask.device.type for mask in masks} == {"cuda"}


def test_documents_in_a_graph(cuda):
    """With length and max_len nothing waits for the device."""
    cu = torch.tensor([0, 70, 70, 300, 640], dtype=torch.int32, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = BlockMask.from_documents(cu, 64, 64, True, length=640, max_len=400)
    cu.copy_(torch.tensor([0, 1, 390, 400, 640], dtype=torch.int32))
    graph.replay()
    expected = BlockMask.from_documents(cu, 64, 64, True)
    assert mask.to_dense().equal(expected.to_dense())
