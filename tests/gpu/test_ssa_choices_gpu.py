"""SSA's choice on the GPU, against its definition and against the CPU."""

import pytest
import ssa_cases
import torch
from poison import poisoned

from sparse_fmha import patterns
from sparse_fmha._ops import ssa_choices

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(given, device):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in given.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ssa_cases.CASES)
def test_the_definition(cuda, name, dtype):
    given = ssa_cases.CASES[name].arguments(dtype)
    with poisoned():
        found = ssa_choices.choices(**on_gpu(given, cuda))
    chosen = ssa_cases.check(found, given)
    assert chosen > 0 or given["few"] == 0


@pytest.mark.parametrize("few", [15, 512])
def test_many_blocks_as_on_the_cpu(cuda, few):
    generator = torch.Generator().manual_seed(few)
    q = torch.randn(1, 256, 8, 128, generator=generator).to(torch.bfloat16)
    means = torch.randn(1, 1, 5000, 2, 128, generator=generator).to(torch.bfloat16)
    given = {"block": 16, "at": 79700, "few": few, "scale": 128**-0.5}
    found = ssa_choices.choices(q.to(cuda), means.to(cuda), **given).cpu()
    wanted = ssa_choices.choices(q, means, **given)
    assert found.shape == wanted.shape
    # Random weights are a few 1e-6 apart at the cut once in a while; rows may then differ by one.
    same = found.eq(wanted).all(-1).float().mean()
    assert same > (0.999 if few == 15 else 0.98)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_is_that_of_the_cpu(cuda, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 900, h, 64, generator=generator).to(dtype) for h in (8, 2))
    found = patterns.ssa(q.to(cuda), k.to(cuda)).to_dense().cpu()
    wanted = patterns.ssa(q, k).to_dense()
    assert found.eq(wanted).all(-1).float().mean() > 0.999


def test_refusals(cuda):
    given = on_gpu(ssa_cases.CASES["plain"].arguments(torch.bfloat16), cuda)
    with pytest.raises(RuntimeError, match="few must be from 0 to 512, got 513"):
        ssa_choices.choices(**{**given, "few": 513})
    with pytest.raises(RuntimeError, match=r"at most 16 heads of q on CUDA, got 1 for 17"):
        ssa_choices.choices(**on_gpu(ssa_cases.Case(heads=17).arguments(torch.bfloat16), cuda))
    with pytest.raises(RuntimeError, match=r"q must have dtype .* or float32 on CUDA, got Double"):
        ssa_choices.choices(**on_gpu(ssa_cases.Case().arguments(torch.float64), cuda))
