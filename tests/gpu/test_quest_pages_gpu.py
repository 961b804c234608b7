"""Quest's choice on the GPU, against its definition and against the CPU."""

import pytest
import quest_cases
import torch
from poison import poisoned

from sparse_fmha._ops import quest_pages

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(given, device):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in given.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", quest_cases.CASES)
def test_the_definition(cuda, name, dtype):
    case = quest_cases.CASES[name]
    given = case.arguments(dtype)
    with poisoned():
        found = quest_pages.choose(**on_gpu(given, cuda))
    quest_cases.check(found, quest_cases.expected(**given), case.best)


@pytest.mark.parametrize(
    "case",
    [
        quest_cases.Case(batch=16, heads=32, heads_kv=8, dim=128, page=64, width=1024, best=101),
        quest_cases.Case(batch=1, heads=32, heads_kv=8, dim=128, width=8192, best=819),
        quest_cases.Case(batch=2, heads=2, heads_kv=1, dim=64, width=20000, best=64, page=1),
    ],
    ids=["many requests", "one long request", "more scores than shared memory has room for"],
)
def test_larger_ones_as_on_the_cpu(cuda, case):
    given = case.arguments(torch.bfloat16)
    found = quest_pages.choose(**on_gpu(given, cuda))
    for x, y in zip(found, quest_pages.choose(**given), strict=True):
        assert x.cpu().equal(y)


def test_a_graph_follows_lengths_bounds_and_pages(cuda):
    given = quest_cases.CASES["many heads"].arguments(torch.bfloat16)
    held = on_gpu(given, cuda)
    quest_pages.choose(**held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = quest_pages.choose(**held)
    generator = torch.Generator().manual_seed(4)
    for shift in range(3):
        lengths = torch.randint(0, 2600, (3,), generator=generator).int()
        given["seq_lens"].copy_(lengths)
        given["low"].copy_(given["low"].roll(shift, 0))
        given["high"].copy_(given["high"].roll(shift, 0))
        given["page_table"].copy_(given["page_table"].roll(1, 1))
        for key in ("seq_lens", "low", "high", "page_table"):
            held[key].copy_(given[key])
        graph.replay()
        quest_cases.check(found, quest_cases.expected(**given), given["best"])
