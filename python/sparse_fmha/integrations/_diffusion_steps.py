"""Finds the denoising step of a transformer call; several runs may be interleaved.

A transformer receives a timestep, but not the run that it belongs to. A run is identified by what
stays the same: the `Request` it is called in, else the tensor of its text embeddings and its
thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_fmha._checks import check_int
from sparse_fmha.integrations._reports import Reports

KEPT = 256  # maximum number of runs; the least recently called ones are dropped
_requests: ContextVar[tuple[Request, ...]] = ContextVar("sparse_fmha_requests", default=())
_local = threading.local()


class Request:
    """One denoising run: transformer calls inside it are steps of this run only.

        request = Request()
        for t in timesteps:
            with request:
                noise = transformer(latents, timestep=t, ...)

    It can be entered repeatedly, from any thread. Do not switch to another run inside its `with`.

    Args:
        steps: number of steps of the run, for shares of it and `last_dense_steps`; default: of the
            scheduler of the pipeline that was enabled.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = None if steps is None else check_int("steps", steps, 1)
        self._runs: WeakKeyDictionary[Steps, Run] = WeakKeyDictionary()

    def __enter__(self) -> Request:
        _requests.set((*_requests.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _requests.set(_requests.get()[:-1])


class Thread:
    """Represents a thread and ends with it; needed because thread idents are reused."""


def _thread() -> Thread:
    if not hasattr(_local, "thread"):
        _local.thread = Thread()
    thread: Thread = _local.thread
    return thread


@dataclass(eq=False)
class Run:
    """The timesteps of a run so far, and where its calls came from."""

    times: tuple[float, ...]
    thread: ref[Thread] | None = None
    text: StorageWeakRef | None = None
    model: int | None = None
    new_text: bool = True  # the text was used in one step only
    used: int = 0  # call count at its last use
    total: int | None = None  # its number of steps, where it is needed

    @property
    def last(self) -> float:
        return self.times[-1]

    @property
    def step(self) -> int:
        return len(self.times) - 1

    def owner(self) -> Thread | None:
        """The thread, or None after it has ended."""
        return None if self.thread is None else self.thread()

    def begins_as(self, times: tuple[float, ...]) -> bool:
        return self.times[: len(times)] == times

    def text_is_gone(self) -> bool:
        return self.text is None or self.text.expired()

    def is_over(self) -> bool:
        """A text that was freed after several steps is not used again."""
        return not self.new_text and self.text is not None and self.text.expired()


class Schedule:
    """The number of steps of a pipeline's next run. A pipeline is not kept alive, and a copy of a
    model has none."""

    def __init__(self, pipe: object) -> None:
        self.pipe = ref(pipe)

    def __call__(self) -> int | None:
        """The distinct timesteps from the first one on that the run takes; None if unknown."""
        scheduler: Any = getattr(self.pipe(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            return None
        begin = getattr(scheduler, "begin_index", None) or 0  # an image's, by its strength
        return len(set(timesteps[begin:].tolist())) or None


@dataclass(eq=False)
class Steps:
    """Finds the first and last steps of each run, by their number or share.

    A smaller timestep is the next step of a run; a larger one begins another run. So the calls of
    one step, with and without the prompt, count once. If each token has its own timestep, the
    largest one is used: that of given frames is always 0. A copy starts without runs.
    """

    first: float
    last: float = 0
    schedule: Callable[[], int | None] | None = None
    counts: bool = False  # the number of a step is needed, also of those behind the first ones
    reports: Reports = field(default_factory=Reports)
    runs: list[Run] = field(default_factory=list)
    calls: int = 0
    sparse: bool = False  # whether any step was sparse

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Steps], tuple[float, float, None, bool]]:
        return Steps, (self.first, self.last, None, self.counts)

    @property
    def named(self) -> str:
        given = {"first_dense_steps": self.first, "last_dense_steps": self.last}
        named = [f"{name} = {value}" for name, value in given.items() if value]
        return " and ".join([*named, *["by_step"] * self.counts])

    def is_dense(self, timestep: Tensor | float | None, text: object, model: object) -> bool:
        """Whether a call is one of the first or last steps of its run; advances the run."""
        return self.place(timestep, text, model)[0]

    def place(
        self, timestep: Tensor | float | None, text: object, model: object
    ) -> tuple[bool, int]:
        """Whether a call is dense as one of the first or last steps of its run, which it advances,
        and how many of its sparse steps were before.

        Args:
            timestep: timestep of the call, or of each batch entry or token.
            text: the embeddings; calls of one run pass the same tensor, or a view of it.
            model: the model called; a run may continue in another model.

        Raises:
            RuntimeError: interleaved runs cannot be told apart, and the result depends on it.
            ValueError: no timestep, or the number of steps is needed and unknown.
        """
        if not self.first and not self.last and not self.counts:
            return False, 0
        if timestep is None:
            raise ValueError(f"timestep must be given to count {self.named}, got None")
        now = float(timestep.max() if isinstance(timestep, Tensor) else timestep)
        with self.lock:
            self.calls += 1
            requests = _requests.get()
            if requests:
                run = self._of_request(requests[-1], now)
            else:
                text = StorageWeakRef(text.untyped_storage()) if torch.is_tensor(text) else None
                run = self._of_text(text, id(model), now)
            run.used = self.calls
            first, last = self._bounds(run)
            dense = not first <= run.step < last
            self.sparse |= not dense
        return dense, max(run.step - int(first), 0)

    def _bounds(self, run: Run) -> tuple[float, float]:
        """The first step of a run that is sparse, and the first behind it that is dense."""
        if not self.last and isinstance(self.first, int):
            return self.first, math.inf
        if run.total is None:
            requests = _requests.get()
            run.total = requests[-1].steps if requests else None
            if run.total is None and self.schedule is not None:
                run.total = self.schedule()
        if run.total is None:
            raise ValueError(
                f"the number of steps of a run must be known for {self.named}: enable a pipeline "
                "that has a scheduler, or make each call of a run inside `with request:`, its own "
                "sparse_fmha.integrations.diffusers.Request(steps)"
            )
        first, last = (_count(value, run.total) for value in (self.first, self.last))
        return first, run.total - last

    def _of_request(self, request: Request, now: float) -> Run:
        run = request._runs.get(self)
        if run is None or now > run.last:
            self._report_dense(run)
            run = request._runs[self] = Run((now,))
        elif now < run.last:
            run.times += (now,)
        return run

    def _of_text(self, text: StorageWeakRef | None, model: int, now: float) -> Run:
        here = _thread()
        mine = [r for r in self.runs if r.owner() is here]
        left = [r for r in self.runs if r.owner() is None]  # runs of threads that have ended
        near = mine or left
        before = max(near, key=lambda r: r.used, default=None)
        own = [r for r in mine if r.text == text] or [r for r in left if r.text == text]
        run = self._next(own, now) if own else self._with_new_text(near, before, model, now)
        if run is not None:
            run.new_text = not own
            run.times += (now,)
        else:
            run = self._another(own, before, now)
            kept = [r for r in self.runs if r is before or not r.is_over()]
            self.runs = [*sorted(kept, key=lambda r: -r.used)[: KEPT - 1], run]
        run.thread, run.text, run.model = ref(here), text, model
        return run

    def _next(self, runs: list[Run], now: float, may_begin: bool = False) -> Run | None:
        """The run that continues, among runs with one text and thread.

        Runs with the same schedule do not overtake each other, so it is the nearest of those. Among
        different schedules it is the one called last, since others may be abandoned; an error is
        raised if the result depends on the choice.

        Args:
            may_begin: the call may also be the first of a run.
        """
        ahead = [r for r in runs if r.last > now]
        if not ahead:
            return None
        latest = max(ahead, key=lambda r: r.used)
        best = min((r for r in ahead if r.begins_as(latest.times)), key=lambda r: (r.last, -r.used))
        steps = {r.step + 1: f"of one at {r.last:g}" for r in ahead if not best.begins_as(r.times)}
        last = max(runs, key=lambda r: r.used).last
        if may_begin or (now > last and not _seen(best, now, runs)):
            steps[0] = "of one that begins"
        for step, other in steps.items():
            near = self.last or self.counts or min(step, best.step + 1) < self._bounds(best)[0]
            if step != best.step + 1 and near:
                raise RuntimeError(
                    f"runs with {self.named}, one text and one thread must "
                    f"have one schedule, got a call at timestep {abs(now):g} that is step "
                    f"{best.step + 1} of a run at {abs(best.last):g} or step {step} {other}; make "
                    "each call of a run inside `with request:`, its own "
                    "sparse_fmha.integrations.diffusers.Request()"
                )
        return best

    def _with_new_text(
        self, near: list[Run], before: Run | None, model: int, now: float
    ) -> Run | None:
        """The run that continues with a new text: one with another text in each step, or one that
        changes to another model."""
        runs = [r for r in near if r.model != model or (r.new_text and r.text_is_gone())]
        rises = before is not None and now > before.last
        if rises:
            runs = [r for r in runs if _seen(r, now, near)]
        return self._next(runs, now, may_begin=rises)

    def _another(self, own: list[Run], before: Run | None, now: float) -> Run:
        """A new run: for another call of an earlier call's step, or for the first call of a run."""
        latest = max(own, key=lambda r: r.used, default=before)
        same: list[Run] = []
        if latest is not None:
            same = [r for r in own if r.last == now and (r is latest or r.begins_as(latest.times))]
            if latest.last == now:
                same.append(latest)
        if same:
            return Run(same[-1].times)
        self._report_dense(before)
        if not own and before is not None and before.last > now:
            self.reports(
                "text",
                f"{self.named} counts a call at timestep {abs(now):g}, after one at "
                f"{abs(before.last):g}, as the first of a run: its text embeddings are new. If "
                "each step has new ones, make the calls of a run inside `with request:`, its own "
                "sparse_fmha.integrations.diffusers.Request()",
            )
        return Run((now,))

    def _report_dense(self, before: Run | None) -> None:
        if before is not None and not self.sparse:
            self.reports(
                "first_dense_steps",
                f"{self.named} made a whole run dense: it had "
                f"{before.step + 1} steps before another run began",
            )


def _count(steps: float, total: int) -> int:
    """A number of steps, or a share of them rounded up."""
    return steps if isinstance(steps, int) else math.ceil(steps * total - 1e-9)


def _seen(run: Run, now: float, runs: list[Run]) -> bool:
    """Whether another run with the same schedule continued to `now`."""
    return any(r.begins_as((*run.times, now)) for r in runs)
