"""One step's exchange of keys and values, and the way back of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha.distributed import _collectives, _groups
from sparse_fmha.distributed._steps import Rows, Step


class Flight:
    """A message under way. Its tensors are referenced until the current stream waits for it."""

    def __init__(
        self, sent: Tensor, out: Sequence[int], back: Sequence[int], group: dist.ProcessGroup,
        name: str,
    ) -> None:  # fmt: skip
        self._sent: Tensor | None = sent.contiguous()
        self._name = name
        with _groups.named(name):
            self._received, self._work = _collectives.start_all_to_all(
                self._sent, group, (list(out), list(back)), async_op=True
            )

    def wait(self) -> Tensor:
        with _groups.named(self._name):
            self._work.wait()
        self._sent = None
        return self._received


def send(own: Tensor, step: Step, group: dist.ProcessGroup, name: str) -> Flight:
    """Sends the keys of a step, from `[tokens, ...]`; receives those for this rank."""
    parts = [part for rows in step.sent for part in _parts(own, rows)]
    sent = parts[0] if len(parts) == 1 else torch.cat(parts or [own[:0]])
    return Flight(sent, _counts(step), step.received, group, name)


def send_back(gradient: Tensor, step: Step, group: dist.ProcessGroup, name: str) -> Flight:
    """Sends the gradients of the keys that `send` received to where these came from."""
    return Flight(gradient, step.received, _counts(step), group, name)


def add(total: Tensor, returned: Tensor, step: Step) -> None:
    """Adds what `send_back` received to the gradients of a rank's own keys, in rank order."""
    for rows, part in zip(step.sent, returned.split(_counts(step)), strict=True):
        if isinstance(rows, Tensor):
            total.index_add_(0, rows, part.to(total.dtype))
            continue
        first = 0
        for some in rows:
            size = some.stop - some.start
            total[some] += part[first : first + size]
            first += size


def _parts(own: Tensor, rows: Rows) -> list[Tensor]:
    if isinstance(rows, Tensor):
        return [own.index_select(0, rows)]
    return [own[some] for some in rows]


def _counts(step: Step) -> list[int]:
    return [
        len(rows) if isinstance(rows, Tensor) else sum(some.stop - some.start for some in rows)
        for rows in step.sent
    ]
