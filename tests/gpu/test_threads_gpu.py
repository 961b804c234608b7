"""Calls from other threads, processes, devices, streams and graphs.

A thread has no CUDA context until its first call into the runtime, which may be ours.
"""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_calls import op_calls

pytestmark = pytest.mark.gpu

OPS = list(op_calls())


@pytest.fixture(scope="module")
def calls(cuda):
    return op_calls(cuda, torch.bfloat16)


def in_a_thread(function):
    """Its result, computed in a thread that has made no CUDA call before."""
    results = []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def equal(got, expected):
    torch.cuda.synchronize()
    return all(a.equal(b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_first_cuda_call_of_a_thread(calls, op):
    expected = calls[op]()
    assert equal(in_a_thread(calls[op]), expected)


@pytest.mark.parametrize("op", OPS)
def test_stream_of_a_thread(calls, op):
    expected = calls[op]()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()

    def run():
        with torch.cuda.stream(stream):
            return calls[op]()

    assert equal(in_a_thread(run), expected)


@pytest.mark.parametrize("op", OPS)
def test_capture_in_a_thread(calls, op):
    expected = calls[op]()
    torch.cuda.synchronize()

    def run():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = calls[op]()
        graph.replay()
        return results

    assert equal(in_a_thread(run), expected)


def test_many_threads_at_once(calls):
    """A thousand mixed calls, each worker on a stream of its own."""
    expected = {op: call() for op, call in calls.items()}
    torch.cuda.synchronize()

    def work(worker):
        wrong = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(125):
                op = OPS[(7 * worker + i) % len(OPS)]
                got = calls[op]()
                torch.cuda.current_stream().synchronize()
                if not all(a.equal(b) for a, b in zip(got, expected[op], strict=True)):
                    wrong.append(op)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert [op for wrong in pool.map(work, range(8)) for op in wrong] == []


# Where no CUDA call was made before, so that the library's own is the first of its kind. Each ends
# with the results of all ops, `got`, and compares them with those of the main thread.
FRESH = {
    "thread": """
        calls = op_calls("cuda", torch.bfloat16)
        got = in_a_thread(lambda: run(calls))
    """,
    "thread that makes the tensors": """
        calls = in_a_thread(lambda: op_calls("cuda", torch.bfloat16))
        got = in_a_thread(lambda: run(calls))
    """,
    "capture": """
        calls = op_calls("cuda", torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(calls)
        graph.replay()
    """,
    "spawned process": """
        import torch.multiprocessing as mp
        from concurrent.futures import ProcessPoolExecutor
        calls = op_calls("cuda", torch.bfloat16)
        with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
            there = pool.submit(run_on_the_cpu).result()
        got = {op: [x.cuda() for x in results] for op, results in there.items()}
    """,
    "second device": """
        calls = op_calls("cuda:1", torch.bfloat16)
        got = in_a_thread(lambda: run(calls))
        assert torch.cuda.current_device() == 0
        assert in_a_thread(torch.cuda.current_device) == 0
    """,
    "second device, chosen in the thread": """
        calls = op_calls("cuda:1", torch.bfloat16)
        here = op_calls("cuda:0", torch.bfloat16)
        def choose():
            torch.cuda.set_device(1)
            results = run(here)
            assert torch.cuda.current_device() == 1
            return results, run(calls)
        first, got = in_a_thread(choose)
        assert torch.cuda.current_device() == 0
        compare(first, run(here))
    """,
}
COMMON = """
import torch
from op_calls import op_calls
from test_threads_gpu import in_a_thread

def run(calls):
    return {op: call() for op, call in calls.items()}

def run_on_the_cpu():
    results = run(op_calls("cuda", torch.bfloat16))
    return {op: [x.cpu() for x in each] for op, each in results.items()}

def compare(got, expected):
    torch.cuda.synchronize(got["fmha_fwd"][0].device)
    wrong = [op for op, each in expected.items()
             if not all(a.equal(b) for a, b in zip(got[op], each, strict=True))]
    assert not wrong, wrong
"""


@pytest.mark.parametrize("place", FRESH)
def test_fresh_process(tmp_path, place):
    if "second device" in place and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    body = textwrap.indent(textwrap.dedent(FRESH[place]), "    ")
    script = tmp_path / "fresh.py"
    script.write_text(f"{COMMON}\nif __name__ == '__main__':{body}    compare(got, run(calls))\n")
    paths = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
