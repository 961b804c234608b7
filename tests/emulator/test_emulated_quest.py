"""Quest's choice on the emulator: the kernels that any GPU runs, without rows."""

import pytest
import quest_cases
import torch

from sparse_fmha._ops import quest_pages


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", quest_cases.CASES)
def test_the_definition(name, dtype):
    case = quest_cases.CASES[name]
    given = case.arguments(dtype)
    quest_cases.check(quest_pages.choose(**given), quest_cases.expected(**given), case.best)


@pytest.mark.parametrize("q_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bounds_of_another_dtype(q_dtype):
    given = quest_cases.CASES["odd numbers"].arguments(torch.float32, q_dtype)
    quest_cases.check(quest_pages.choose(**given), quest_cases.expected(**given), 7)


def test_more_scores_than_shared_memory_has_room_for():
    case = quest_cases.Case(batch=1, heads=1, heads_kv=1, dim=8, page=1, width=10500, best=90)
    given = case.arguments(torch.bfloat16)
    quest_cases.check(quest_pages.choose(**given), quest_cases.expected(**given), case.best)


def test_bounds_in_fp64():
    given = quest_cases.CASES["plain"].arguments(torch.float64)
    with pytest.raises(RuntimeError, match=r"low must have dtype .* on CUDA, got Double"):
        quest_pages.choose(**given)
