"""attention on the GPU as a part of PyTorch: streams, graphs, tracing, autocast, autograd."""

import shutil

import pytest
import torch

import sparse_fmha

pytestmark = pytest.mark.gpu

OP = torch.ops.sparse_fmha.fmha_fwd


def test_runs_on_the_current_stream(make_qkv):
    """The inputs arrive late, on a side stream that nothing else waits for."""
    q, k, v = make_qkv(1, 1000, 1000, 4, 4, 128)
    expected = sparse_fmha.attention(q, k, v, causal=True)
    late_q, late_k, late_v = (torch.full_like(x, torch.nan) for x in (q, k, v))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for late, x in ((late_q, q), (late_k, k), (late_v, v)):
            late.copy_(x)
        out = sparse_fmha.attention(late_q, late_k, late_v, causal=True)
        assert not side.query(), "the call waited for the stream"
    side.synchronize()
    assert out.equal(expected)


def test_two_streams_at_once(make_qkv):
    """Calls under way together do not share their scratch memory."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    cases = [make_qkv(1, 500 + 300 * i, 900, 8, 8, 128, seed=i) for i in range(4)]
    expected = [sparse_fmha.attention(*case, causal=True) for case in cases]
    torch.cuda.synchronize()
    for _ in range(10):
        outs = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                outs.append(sparse_fmha.attention(*case, causal=True))
        torch.cuda.synchronize()
        for out, wanted in zip(outs, expected, strict=True):
            assert out.equal(wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_cuda_graph(make_qkv, causal):
    q, k, v = make_qkv(2, 300, 700, 8, 2, 128)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sparse_fmha.attention(q, k, v, causal=causal)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sparse_fmha.attention(q, k, v, causal=causal, return_lse=True)
    for seed in (5, 6, 7):
        for static, new in zip((q, k, v), make_qkv(2, 300, 700, 8, 2, 128, seed=seed), strict=True):
            static.copy_(new)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        expected = sparse_fmha.attention(q, k, v, causal=causal, return_lse=True)
        assert out.equal(expected[0])
        assert lse.equal(expected[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(make_qkv, backend):
    if backend == "inductor" and shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler for inductor")

    def block(q, k, v):
        out, lse = sparse_fmha.attention(q, k, v, causal=True, return_lse=True)
        return out + 1, lse * 2

    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for length in (300, 301, 500):
        tensors = make_qkv(2, length, length, 4, 2, 64)
        out, lse = compiled(*tensors)
        expected, expected_lse = block(*tensors)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(make_qkv, dtype, causal):
    for sizes in ((1, 64, 64, 1, 1, 64), (2, 100, 37, 6, 2, 128), (2, 37, 100, 4, 4, 40)):
        torch.library.opcheck(OP, (*make_qkv(*sizes, dtype), causal, None))
        torch.library.opcheck(OP, (*make_qkv(*sizes, dtype), causal, -0.25))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(make_qkv, dtype):
    q, k, v = make_qkv(2, 200, 200, 4, 4, 64, torch.float32)
    with torch.autocast("cuda", dtype=dtype):
        out, lse = sparse_fmha.attention(q, k, v, return_lse=True)
    expected = sparse_fmha.attention(*(x.to(dtype) for x in (q, k, v)), return_lse=True)
    assert out.dtype == dtype
    assert out.equal(expected[0])
    assert lse.dtype == torch.float32
    assert lse.equal(expected[1])
