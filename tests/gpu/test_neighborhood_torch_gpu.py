"""neighborhood_attention on the GPU as a part of PyTorch: repeats, streams, graphs, tracing."""

import shutil

import pytest
import torch
from neighborhoods import Case

import sparse_fmha

pytestmark = pytest.mark.gpu

OP = torch.ops.sparse_fmha.neighborhood_fwd
SHARED = {"extra": 70, "batch": 2, "heads": 8, "heads_kv": 2, "dim": 128}
CASES = [
    Case((1500,), 200, 16, **SHARED),
    Case((40, 50), (12, 13), (2, 1), (3, 1), (False, True), **SHARED),
    Case((12, 14, 15), (5, 6, 7), (1, 2, 1), (2, 1, 1), (True, False, False), **SHARED),
]


def run(case, given):
    q, k, v, extra_k, extra_v = given
    return sparse_fmha.neighborhood_attention(
        q, k, v, extra_k=extra_k, extra_v=extra_v, return_lse=True, **case.options()
    )


def same(results, expected):
    return all(a.equal(b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_every_time(tensors, attend, case, dim):
    case = case.with_(dim=dim)
    q, k, v, extra_k, extra_v = given = tensors(case)
    copies = [x.clone() for x in given]
    expected = run(case, given)
    for _ in range(5):
        assert same(run(case, given), expected)
    assert same(attend(q, k, v, extra_k=extra_k, extra_v=extra_v, **case.options()), expected)
    assert same(given, copies)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_and_heads_are_independent(tensors, case, dim):
    case = case.with_(dim=dim, batch=3)
    q, *others = tensors(case)
    out, lse = run(case, (q, *others))
    for b, h in [(0, 0), (1, 3), (2, 7)]:
        group = slice(h // 4, h // 4 + 1)
        own = [x[b : b + 1, ..., group, :] for x in others]
        alone = run(case, (q[b : b + 1, ..., h : h + 1, :], *own))
        assert same(alone, (out[b : b + 1, ..., h : h + 1, :], lse[b : b + 1, ..., h : h + 1]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_on_the_current_stream(tensors, case):
    """The inputs arrive late, on a side stream that nothing else waits for."""
    given = tensors(case)
    expected = run(case, given)
    late = [torch.full_like(x, torch.nan) for x in given]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late, given, strict=True):
            x.copy_(y)
        results = run(case, late)
        assert not side.query(), "the call waited for the stream"
    side.synchronize()
    assert same(results, expected)


def test_streams_at_once(tensors):
    """Calls under way together do not share their scratch memory."""
    streams = [torch.cuda.Stream() for _ in CASES]
    given = [tensors(case) for case in CASES]
    expected = [run(*pair) for pair in zip(CASES, given, strict=True)]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, *pair in zip(streams, CASES, given, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(*pair))
        torch.cuda.synchronize()
        assert all(map(same, results, expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_graph(tensors, case):
    given = tensors(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(case, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case, given)
    for seed in (5, 6, 7):
        for static, new in zip(given, tensors(case, seed=seed), strict=True):
            static.copy_(new)
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        assert same(results, run(case, given))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(tensors, backend):
    if backend == "inductor" and shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler for inductor")

    def block(*given):
        out, lse = run(CASES[1], given)
        return out + 1, lse * 2

    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for grid in ((36, 40), (37, 40), (50, 60)):
        given = tensors(CASES[1].with_(grid=grid))
        for result, expected in zip(compiled(*given), block(*given), strict=True):
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("grid", [(40,), (6, 9), (4, 5, 6)], ids=str)
def test_opcheck(tensors, grid, extra, dtype):
    q, k, v, *extras = tensors(Case(grid, 3, extra=extra, batch=2, dtype=dtype))
    axes = len(grid)
    for stride, dilation, causal, scale in ((1, 1, 0, None), (2, 1, 1, -0.25)):
        per_axis = [[value] * axes for value in (3, stride, dilation, causal)]
        torch.library.opcheck(OP, (q, k, v, *per_axis, scale, *extras))


def test_autocast(tensors):
    case = CASES[1].with_(dtype=torch.float32)
    given = tensors(case)
    with torch.autocast("cuda", dtype=torch.float16):
        results = run(case, given)
    assert results[0].dtype == torch.float16
    assert results[1].dtype == torch.float32
    assert same(results, run(case, [x.half() for x in given]))


def test_second_device(tensors):
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    given = tensors(CASES[2])
    there = [x.to("cuda:1") for x in given]
    results = run(CASES[2], there)
    assert torch.cuda.current_device() == 0
    assert results[0].device == there[0].device
    assert same([x.cpu() for x in results], [x.cpu() for x in run(CASES[2], given)])
