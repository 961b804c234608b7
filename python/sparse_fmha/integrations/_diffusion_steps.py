"""Which denoising step a call of a transformer is, of several runs that may take turns.

A transformer is told a timestep and not whose it is. A run is known by what stays the same in it:
the `Request` it is called in, else the tensor of its text embeddings and its thread.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_fmha.integrations._reports import Reports

KEPT = 256  # runs; of more, those that were called longest ago are forgotten
_requests: ContextVar[tuple[Request, ...]] = ContextVar("sparse_fmha_requests", default=())
_local = threading.local()


class Request:
    """One denoising run: calls of transformers inside it are its steps, and no others'.

        request = Request()
        for t in timesteps:
            with request:
                noise = transformer(latents, timestep=t, ...)

    It can be entered again, from any thread. Do not yield to another run inside the `with` of one.
    """

    def __init__(self) -> None:
        self._runs: WeakKeyDictionary[Steps, Run] = WeakKeyDictionary()

    def __enter__(self) -> Request:
        _requests.set((*_requests.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _requests.set(_requests.get()[:-1])


class Thread:
    """Stands for a thread, and ends with it; idents of threads are used again."""


def _thread() -> Thread:
    if not hasattr(_local, "thread"):
        _local.thread = Thread()
    return _local.thread


@dataclass(eq=False)
class Run:
    """The timesteps of a run so far, and who asked for them."""

    times: tuple[float, ...]
    thread: ref[Thread] | None = None
    text: StorageWeakRef | None = None
    model: int | None = None
    new_text: bool = True  # the text was there in one step only
    begun: int = 0  # by the count of calls
    used: int = 0

    @property
    def last(self) -> float:
        return self.times[-1]

    @property
    def step(self) -> int:
        return len(self.times) - 1

    def begins_as(self, other: Run) -> bool:
        return self.times[: len(other.times)] == other.times


@dataclass(eq=False)
class Steps:
    """Tells the first `dense` steps of each run.

    A smaller timestep is the next step of a run, a larger one begins another run. So the calls of
    one step, with and without the prompt, are one step. Where each token has its timestep, the
    largest counts: those of given frames are 0 throughout. A copy has seen no run.
    """

    dense: int
    reports: Reports = field(default_factory=Reports)
    runs: list[Run] = field(default_factory=list)
    calls: int = 0
    sparse: bool = False  # whether any step was

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return Steps, (self.dense,)

    def is_dense(self, timestep: Tensor | float | None, text: object, model: object) -> bool:
        """Whether a call is one of the first steps of its run, which goes on by it.

        Args:
            timestep: of the call, or of each batch entry or token.
            text: the embeddings; calls of one run hand over the same tensor, or a view of it.
            model: a run may go on in another one.

        Raises:
            RuntimeError: runs that take turns cannot be told apart, and it matters.
        """
        if not self.dense:
            return False
        if timestep is None:
            raise ValueError(
                f"first_dense_steps is {self.dense}, and the call has no timestep to count by"
            )
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
            dense = run.step < self.dense
            self.sparse |= not dense
        return dense

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
        # A text that is gone after several steps will not come again.
        self.runs = [r for r in self.runs if r.new_text or r.text is None or not r.text.expired()]
        near = [r for r in self.runs if r.thread() in (here, None)]
        own = [r for r in near if r.text == text]
        run = self._next([r for r in own if r.last > now], now)
        if run is not None:
            run.new_text = False
        elif not own:
            run = _of_new_text(near, model, now)
        if run is not None:
            run.times += (now,)
        else:
            run = self._another(own, near, now)
            self.runs = [*sorted(self.runs, key=lambda r: -r.used)[: KEPT - 1], run]
        run.thread, run.text, run.model = ref(here), text, model
        return run

    def _next(self, ahead: list[Run], now: float) -> Run | None:
        """Which of the runs of one text and thread goes on: the one that is nearest.

        Of runs with one schedule none overtakes another, so that is right. Runs with other
        schedules count if they took turns with it.
        """
        if not ahead:
            return None
        latest = max(ahead, key=lambda r: r.used)
        turns = [r for r in ahead if r.used >= latest.begun or r.begins_as(latest)]
        best = min(turns, key=lambda r: (r.last, -r.used))
        for other in turns:
            same = other.step == best.step or min(other.step, best.step) + 1 >= self.dense
            if not same and other.last > best.last and not best.begins_as(other):
                raise RuntimeError(
                    f"first_dense_steps is {self.dense}, and a call at timestep {now:g} is step "
                    f"{best.step + 1} of a run at {best.last:g} or step {other.step + 1} of one at "
                    f"{other.last:g}, which take turns; make each call of a run inside `with "
                    "request:`, its own sparse_fmha.integrations.diffusers.Request()"
                )
        return best

    def _another(self, own: list[Run], near: list[Run], now: float) -> Run:
        """A call of the same step as one before, or the first of a run."""
        before = max(near, key=lambda r: r.used, default=None)
        same = [r for r in own if r.last == now]
        if not same and not own and before is not None and before.last == now:
            same = [before]  # the same step with another text
        if same:
            times = max(same, key=lambda r: r.used).times
        else:
            self._report_dense(before)
            times = (now,)
        return Run(times, begun=self.calls)

    def _report_dense(self, before: Run | None) -> None:
        if before is not None and not self.sparse:
            self.reports(
                f"first_dense_steps is {self.dense}, and no step was sparse before another run "
                f"began; the one before it had {before.step + 1} steps",
                key="first_dense_steps",
            )


def _of_new_text(near: list[Run], model: int, now: float) -> Run | None:
    """The run that a text not seen before goes on with.

    That is one whose text is new in every step and gone after it, or one in another model.
    """
    left = [r for r in near if r.last > now]
    left = [
        r for r in left if r.model != model or (r.new_text and (r.text is None or r.text.expired()))
    ]
    return min(left, key=lambda r: r.last, default=None)
