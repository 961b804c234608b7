"""One step's exchange of keys and values, and the way back of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha.distributed import _collectives, _groups
from sparse_fmha.distributed._steps import Rows, Step


class Flights:
    """Messages under way. Their tensors are referenced until the current stream waits for them."""

    def __init__(
        self, sent: Sequence[Tensor], out: Sequence[int], back: Sequence[int],
        group: dist.ProcessGroup, name: str,
    ) -> None:  # fmt: skip
        self._sent = [x.contiguous() for x in sent]
        self._name = name
        splits = list(out), list(back)
        with _groups.named(name):
            self._started = [
                _collectives.start_all_to_all(x, group, splits, async_op=True) for x in self._sent
            ]

    def wait(self) -> list[Tensor]:
        """What was received for each message."""
        with _groups.named(self._name):
            for _, work in self._started:
                work.wait()
        self._sent = []
        return [received for received, _ in self._started]


def send(own: Sequence[Tensor], step: Step, group: dist.ProcessGroup, name: str) -> Flights:
    """Sends the keys of a step, some of each `[tokens, ...]`; receives those for this rank."""
    sent = [_chosen(x, step) for x in own]
    return Flights(sent, _counts(step), step.received, group, name)


def send_back(
    gradients: Sequence[Tensor], step: Step, group: dist.ProcessGroup, name: str
) -> Flights:
    """Sends the gradients of the keys that `send` received to where these came from."""
    return Flights(gradients, step.received, _counts(step), group, name)


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


def _chosen(own: Tensor, step: Step) -> Tensor:
    parts = [part for rows in step.sent for part in _parts(own, rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts or [own[:0]])


def _parts(own: Tensor, rows: Rows) -> list[Tensor]:
    if isinstance(rows, Tensor):
        return [own.index_select(0, rows)]
    return [own[some] for some in rows]


def _counts(step: Step) -> list[int]:
    return [
        len(rows) if isinstance(rows, Tensor) else sum(some.stop - some.start for some in rows)
        for rows in step.sent
    ]
