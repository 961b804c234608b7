"""HiP's search on the GPU, against its definition and against the CPU."""

import hip_cases
import pytest
import torch
from poison import poisoned

from sparse_fmha import patterns
from sparse_fmha._ops import hip_search

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(given, device):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in given.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hip_cases.CASES)
def test_the_definition(cuda, name, dtype):
    case = hip_cases.CASES[name]
    given = case.arguments(dtype)
    with poisoned():
        found = hip_search.search(**on_gpu(given, cuda))
    hip_cases.check(found, hip_cases.expected(**given), case.first + case.chunks * case.granule)


@pytest.mark.parametrize(
    "case",
    [
        hip_cases.Case(q_len=1, kv_len=32768, batch=1, chunks=256, block_q=1, sample=1, dim=128),
        hip_cases.Case(q_len=1, kv_len=32768, batch=3, chunks=4096, granule=1, dim=64),
        hip_cases.Case(q_len=2048, kv_len=8192, batch=1, heads=8, chunks=256, dim=128),
        hip_cases.Case(q_len=300, kv_len=8192, heads=5, heads_kv=1, chunks=77, sample=1, page=64),
    ],
    ids=["decode", "many chunks", "prefill", "pages"],
)
def test_larger_ones_as_on_the_cpu(cuda, case):
    given = case.arguments(torch.bfloat16)
    found = hip_search.search(**on_gpu(given, cuda))
    for x, y in zip(found, hip_search.search(**given), strict=True):
        assert x.cpu().equal(y)


def test_a_step_in_a_graph_follows_lengths_and_keys(cuda):
    generator = torch.Generator().manual_seed(2)
    k = torch.randint(-3, 4, (4, 3000, 2, 64), generator=generator).to(cuda, torch.bfloat16)
    q = torch.randint(-3, 4, (4, 1, 8, 64), generator=generator).to(cuda, torch.bfloat16)
    lengths = torch.tensor([3000, 0, 700, 40], dtype=torch.int32, device=cuda)
    found = patterns.HipSearch(4, 2, keys=128, device=cuda)
    found.search(q, k, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.search(q, k, lengths)
        tokens, _ = found.tokens(lengths)
    for seed in range(3):
        lengths.copy_(torch.randint(0, 3001, (4,), generator=generator))
        k.copy_(k.roll(seed + 1, 1))
        graph.replay()
        own = patterns.HipSearch(4, 2, keys=128)
        wanted, _ = own.step(q.cpu(), k.cpu(), lengths.cpu())
        assert tokens.cpu().equal(wanted)


def test_too_many_chunks(cuda):
    given = on_gpu(hip_cases.CASES["plain"].arguments(torch.bfloat16), cuda)
    with pytest.raises(RuntimeError, match="chunks must be at most 4096 on CUDA, got 4097"):
        hip_search.search(**{**given, "chunks": 4097})
    with pytest.raises(RuntimeError, match=r"q must have dtype .* or float32 on CUDA, got Double"):
        hip_search.search(**{**given, "q": given["q"].double(), "k": given["k"].double()})
