"""Dilations that take the rows of dilation classes: launches, layouts, replays, huge tensors."""

import pytest
import torch
from neighborhoods import LAYOUTS, Case, laid_out
from other_archs import in_use

import sparse_fmha

pytestmark = pytest.mark.gpu

CASES = [
    Case((1001,), 33, 2, 11, heads=4, heads_kv=2, batch=3, extra=40),
    Case((60, 66), (5, 4), (1, 2), (11, 16), batch=2),
    Case((143, 169), (8, 9), 1, (11, 13), (True, False)),
    Case((5, 37, 40), (2, 3, 4), 1, (2, 11, 9), batch=7),
]


@pytest.fixture(autouse=True)
def hopper(cuda):
    if in_use() != "sm90":
        pytest.skip("other architectures take any dilation in one launch")


def launches(call):
    """Kernels of attention that run in a call."""
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return sum("attention_kernel" in event.name for event in profile.events())


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_launch(tensors, check, case, dim):
    case = case.with_(dim=dim)
    given = tensors(case)
    q, k, v, extra_k, extra_v = given
    options = case.options() | {"extra_k": extra_k, "extra_v": extra_v}
    why = sparse_fmha.explain(sparse_fmha.neighborhood_attention, q, k, v, **options)
    assert why.kernel == f"sm90_neighborhood_bfloat16_d{dim}_dilated"
    check(case, given)
    assert launches(lambda: sparse_fmha.neighborhood_attention(q, k, v, **options)) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(tensors, check, case, layout):
    """NaN around the tensors and between their rows."""
    case = case.with_(dim=40)
    check(case, laid_out(layout, tensors(case)))


def test_replays(tensors, attend):
    case = CASES[1]
    q, k, v, *_ = tensors(case)
    expected, lse = attend(q, k, v, **case.options())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, of_graph = sparse_fmha.neighborhood_attention(
            q, k, v, return_lse=True, **case.options()
        )
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert out.equal(expected)
        assert of_graph.equal(lse)


def test_more_than_2_to_31_elements(cuda):
    """Each class is the attention of its own tokens; the last tokens are beyond 2^31 elements."""
    grid, heads, dim, dilation = (1432, 1432), 8, 136, (11, 13)
    shape = (1, *grid, heads, dim)
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.mem_get_info()[0] < 5 * 2 * torch.Size(shape).numel():
        pytest.skip("needs 22 GB of memory")
    generator = torch.Generator(cuda).manual_seed(1)
    q, k, v = (
        torch.empty(shape, device=cuda, dtype=torch.bfloat16).normal_(generator=generator)
        for _ in range(3)
    )
    out = sparse_fmha.neighborhood_attention(q, k, v, (9, 8), dilation=dilation)
    for residue in ((0, 0), (10, 12)):
        own = [slice(r, None, d) for r, d in zip(residue, dilation, strict=True)]
        place = (slice(None), *own)
        alone = sparse_fmha.neighborhood_attention(q[place], k[place], v[place], (9, 8))
        torch.testing.assert_close(out[place], alone, rtol=0.02, atol=0.02)
