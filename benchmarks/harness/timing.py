"""Times of whole ops, variants interleaved so that a drift of the clock hits all alike.

On the GPU a pair of CUDA events brackets each call. Before the first event the stream is given
work that hides the launch, and that also sets the state of the L2 cache:

    cold   a buffer several times the size of the cache is overwritten
    clean  such a buffer is read, so the op has no lines of others to write back
    warm   the same op runs once, untimed

so the window holds the op and nothing else. Nothing waits for the GPU until a round, one call of
every variant, is queued. The order inside a round is shuffled: power and heat that one variant
leaves to the next are shared out.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
Op = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    median: float
    p10: float
    p90: float
    samples: int


def spread(samples: list[float]) -> Spread:
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), deciles[0], deciles[8], len(samples))


class CudaClock:
    def __init__(self) -> None:
        self._pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, name: str, op: Op) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        op()
        end.record()
        self._pairs.append((name, start, end))

    def read(self) -> list[tuple[str, float]]:
        torch.cuda.synchronize()
        times = [(name, start.elapsed_time(end)) for name, start, end in self._pairs]
        self._pairs.clear()
        return times


class CpuClock:
    def __init__(self) -> None:
        self._times: list[tuple[str, float]] = []

    def time(self, name: str, op: Op) -> None:
        start = time.perf_counter_ns()
        op()
        self._times.append((name, (time.perf_counter_ns() - start) * 1e-6))

    def read(self) -> list[tuple[str, float]]:
        times, self._times = self._times, []
        return times


class Replay:
    """Replays of a CUDA graph of one call, or of several, one after another. The graph keeps its
    tensors; each replay returns the same result, that of the last call."""

    def __init__(self, op: Op, calls: int = 1) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what a first call compiles or allocates
                op()
        torch.cuda.synchronize()
        self._op, self._graph = op, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(calls):
                self._result = op()

    def __call__(self) -> object:
        self._graph.replay()
        return self._result


def captured(op: Op, device: str) -> Op:
    """Replays of the op; on the CPU the op itself, which has run once."""
    if device == "cuda":
        return Replay(op)
    op()
    return op


def _is_turn(round_: int, turns: int, rounds: int) -> bool:
    """Whether an op that has `turns` turns in so many rounds, evenly spread, is due in this one."""
    return round_ >= 0 and (round_ + 1) * turns // rounds > round_ * turns // rounds


def measure(
    ops: dict[str, Op], *, device: str, l2: str, iterations: int, warmup: int, seed: int = 0,
    fewer: dict[str, int] | None = None,
) -> dict[str, Spread]:  # fmt: skip
    """Runs every op warmup + iterations times, round by round; the first op opens each round.

    The ops that `fewer` names run so many times instead, spread over the rounds that count.
    """
    clock = CudaClock() if device == "cuda" else CpuClock()
    flush = torch.zeros(FLUSH_BYTES[device], dtype=torch.int8, device=device)
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in ops}
    first, *rest = ops
    fewer = fewer or {}
    for round_ in range(warmup + iterations):
        order.shuffle(rest)
        for name in (first, *rest):
            if name in fewer and not _is_turn(round_ - warmup, fewer[name], iterations):
                continue
            if l2 == "cold":
                flush.zero_()
            elif l2 == "clean":
                flush.view(torch.float32).sum()
            else:
                ops[name]()
            clock.time(name, ops[name])
        times = clock.read()
        if round_ >= warmup:
            for name, ms in times:
                samples[name].append(ms)
    return {name: spread(values) for name, values in samples.items()}


def measure_host(
    ops: dict[str, Op], *, device: str, calls: int, rounds: int, warmup: int, seed: int = 0
) -> dict[str, Spread]:
    """Milliseconds of the host in a call of each op: the wall time of a batch, by its calls.

    Batches take turns in shuffled rounds. Each begins with an idle device, and nothing waits for it
    inside: so many calls must fit into the queue of launches.
    """
    order, names = random.Random(seed), list(ops)
    samples: dict[str, list[float]] = {name: [] for name in ops}
    for round_ in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            op = ops[name]
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(calls):
                op()
            elapsed = time.perf_counter_ns() - start
            if round_ >= warmup:
                samples[name].append(elapsed * 1e-6 / calls)
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: spread(values) for name, values in samples.items()}
