"""The CPU ops from several threads at once."""

from concurrent.futures import ThreadPoolExecutor

from op_calls import op_calls


def test_many_threads_at_once():
    calls = op_calls(backward=True, on_cpu_only=True)
    expected = {op: call() for op, call in calls.items()}
    ops = [op for _ in range(20) for op in calls]

    def differs(op):
        return not all(a.equal(b) for a, b in zip(calls[op](), expected[op], strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert [op for op, wrong in zip(ops, pool.map(differs, ops), strict=True) if wrong] == []
