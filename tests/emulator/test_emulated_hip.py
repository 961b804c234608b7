"""HiP's search on the emulator: the kernel that any GPU runs, without rows."""

import hip_cases
import pytest
import torch

from sparse_fmha._ops import hip_search

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = [name for name in hip_cases.CASES if name != "more queries than a set holds"]


def check(name, dtype):
    case = hip_cases.CASES[name]
    given = case.arguments(dtype)
    found = hip_search.search(**given)
    hip_cases.check(found, hip_cases.expected(**given), case.first + case.chunks * case.granule)


@pytest.mark.parametrize("name", NAMES)
def test_the_definition(name):
    check(name, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_queries_than_a_set_holds(dtype):
    check("more queries than a set holds", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["odd pages", "the widest heads"])
def test_dtypes(name, dtype):
    check(name, dtype)


def test_more_chunks_than_there_is_memory_for():
    given = hip_cases.CASES["plain"].arguments(torch.bfloat16)
    with pytest.raises(RuntimeError, match="chunks must be at most 4096 on CUDA, got 4097"):
        hip_search.search(**{**given, "chunks": 4097})
    with pytest.raises(RuntimeError, match=r"q must have dtype .* or float32 on CUDA, got Double"):
        hip_search.search(**{**given, "q": given["q"].double(), "k": given["k"].double()})
