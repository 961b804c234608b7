"""The passes of `pass_kv`: keys of a step travel while those of the step before are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha.distributed import _calls, _exchange
from sparse_fmha.distributed._calls import Added
from sparse_fmha.distributed._running import Running
from sparse_fmha.distributed._steps import Piece, Step, halves

# What travels: keys and values `[tokens, B, 2, Hkv, D]`, and any bias `[tokens, B or 1, H or 1]`.
Moved = Sequence[Tensor]


@dataclass(frozen=True)
class Pass:
    """What does not change from the forward to the backward pass."""

    steps: tuple[Step, ...]
    group: dist.ProcessGroup
    scale: float | None

    def start(self, own: Moved, number: int, way: str = "pass_kv") -> _exchange.Flights | None:
        """Starts the exchange of a step; None after the last."""
        if number >= len(self.steps):
            return None
        name = f"{way}: keys of step {number} of {len(self.steps) - 1}"
        return _exchange.send(own, self.steps[number], self.group, name)

    def forward(
        self, q: Tensor, own: Moved, row_threshold: Tensor | None, skip_threshold: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out and lse over all keys."""
        running = Running(q)
        keys, coming = own, self.start(own, 1)
        for number, step in enumerate(self.steps):
            for piece in step.pieces:
                added = _added(keys, piece, row_threshold, skip_threshold)
                results = _calls.forward(
                    piece, q[:, piece.rows], *_of_piece(keys[0], piece), added, self.scale
                )
                running.add(piece.rows, *results)
            if coming is not None:
                keys = coming.wait()
                coming = self.start(own, number + 2)
        return running.result()

    def backward(
        self, of_rows: Sequence[Tensor | None], row_threshold: Tensor | None, own: Moved,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """dq, and the gradients of what a rank's own keys have in `own`, both in fp32 or fp64.

        Half of the queries meet a rank's own keys first, while the first keys of others arrive; the
        other half last, while the last gradients leave.

        Args:
            of_rows: dout, dlse or None, q, out and lse.
            needs: whether dq, whether dk and dv, and whether the gradient of the bias is needed.
        """
        q = of_rows[2]
        assert q is not None, "q is there"
        wanted = needs[1:] if len(own) > 1 else needs[1:2]
        dq = torch.zeros_like(q, dtype=_wide(q), memory_format=torch.contiguous_format)

        def compute(pieces: Iterable[Piece], keys: Moved, sums: list[Tensor]) -> None:
            for piece in pieces:
                rows = [None if x is None else x[:, piece.rows] for x in of_rows]
                parts = _calls.backward(
                    piece, rows, _of_piece(keys[0], piece),
                    _added(keys, piece, row_threshold, None), self.scale, needs,
                )  # fmt: skip
                if needs[0]:
                    dq[:, piece.rows] += parts[0]
                if needs[1]:
                    for place, part in zip(_of_piece(sums[0], piece), parts[1:3], strict=True):
                        place += part
                if wanted[1:] == (True,):
                    place = sums[1][piece.keys]
                    place += parts[3].movedim(2, 0).sum_to_size(place.shape)

        def zeros(like: Moved) -> list[Tensor]:
            return [torch.zeros_like(x, dtype=_wide(x)) for x in like]

        total = zeros(own)
        first, last = halves(self.steps[0].pieces)
        coming = self.start(own, 1, "pass_kv's backward pass")
        leaving: tuple[Step, _exchange.Flights] | None = None
        compute(first, own, total)
        for number, step in enumerate(self.steps[1:], 1):
            assert coming is not None, "each step but the first is started"
            keys, coming = coming.wait(), self.start(own, number + 1, "pass_kv's backward pass")
            sums = zeros(keys)
            compute(step.pieces, keys, sums)
            if any(wanted):
                _add(total, wanted, leaving)
                name = f"pass_kv: gradients of step {number} of {len(self.steps) - 1}"
                # Summed in fp32, and rounded once for each step.
                sent = [x.to(y.dtype) for x, y in zip(sums, own, strict=True)]
                leaving = step, _exchange.send_back(_some(sent, wanted), step, self.group, name)
        compute(last, own, total)
        _add(total, wanted, leaving)
        return dq, total


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _some(moved: Moved, wanted: Sequence[bool]) -> list[Tensor]:
    return [x for x, one in zip(moved, wanted, strict=True) if one]


def _add(
    total: Moved, wanted: Sequence[bool], leaving: tuple[Step, _exchange.Flights] | None
) -> None:
    if leaving is not None:
        step, flights = leaving
        for place, returned in zip(_some(total, wanted), flights.wait(), strict=True):
            _exchange.add(place, returned, step)


def _of_piece(both: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """Keys and values `[tokens, B, 2, Hkv, D]` of a piece, as two views `[B, tokens, Hkv, D]`."""
    k, v = both[piece.keys].movedim(0, 1).unbind(2)
    return k, v


def _added(
    keys: Moved, piece: Piece, row_threshold: Tensor | None, skip_threshold: Tensor | None
) -> Added:
    return Added(
        keys[1][piece.keys].movedim(0, 2) if len(keys) > 1 else None,
        None if row_threshold is None else row_threshold[:, :, piece.rows],
        skip_threshold,
    )
