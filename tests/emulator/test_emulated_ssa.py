"""SSA's choice on the emulator: the kernel that any GPU runs, without rows."""

import pytest
import ssa_cases
import torch

from sparse_fmha._ops import ssa_choices


def check(name, dtype):
    given = ssa_cases.CASES[name].arguments(dtype)
    chosen = ssa_cases.check(ssa_choices.choices(**given), given)
    assert chosen > 0 or given["few"] == 0


@pytest.mark.parametrize("name", ssa_cases.CASES)
def test_the_definition(name):
    check(name, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["odd numbers", "a group of three", "wide heads"])
def test_dtypes(name, dtype):
    check(name, dtype)


def test_what_the_gpu_has_no_memory_or_rows_for():
    given = ssa_cases.CASES["plain"].arguments(torch.bfloat16)
    with pytest.raises(RuntimeError, match="few must be from 0 to 512, got 513"):
        ssa_choices.choices(**{**given, "few": 513})
    with pytest.raises(RuntimeError, match=r"at most 16 heads of q on CUDA, got 1 for 17"):
        ssa_choices.choices(**ssa_cases.Case(heads=17).arguments(torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"q must have dtype .* or float32 on CUDA, got Double"):
        ssa_choices.choices(**ssa_cases.Case().arguments(torch.float64))
