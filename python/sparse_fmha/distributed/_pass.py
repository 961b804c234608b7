"""The passes of `pass_kv`: keys of a step travel while those of the step before are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha.distributed import _calls, _exchange
from sparse_fmha.distributed._running import Running
from sparse_fmha.distributed._steps import Piece, Step, halves

Context = Any  # torch.autograd.function.FunctionCtx, whose attributes are not typed


@dataclass(frozen=True)
class Pass:
    """What does not change from the forward to the backward pass."""

    steps: tuple[Step, ...]
    group: dist.ProcessGroup
    scale: float | None

    def start(self, own: Tensor, number: int) -> _exchange.Flight | None:
        """Starts the exchange of a step; None after the last."""
        if number >= len(self.steps):
            return None
        name = f"pass_kv: keys of step {number} of {len(self.steps) - 1}"
        return _exchange.send(own, self.steps[number], self.group, name)

    def forward(self, q: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        running = Running(q)
        keys, coming = own, self.start(own, 1)
        for number, step in enumerate(self.steps):
            k, v = _keys_and_values(keys)
            for piece in step.pieces:
                of_keys = k[:, piece.keys], v[:, piece.keys]
                results = _calls.forward(piece, q[:, piece.rows], *of_keys, self.scale)
                running.add(piece.rows, *results)
            if coming is not None:
                keys = coming.wait()
                coming = self.start(own, number + 2)
        return running.result()

    def backward(
        self, of_rows: Sequence[Tensor | None], own: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """dq, and the gradients of a rank's own keys and values as these lie in `own`.

        Half of the queries meet a rank's own keys first, while the first keys of others arrive; the
        other half last, while the last gradients leave.

        Args:
            of_rows: dout, dlse or None, q, out and lse.
            own: keys and values.
            needs: whether dq, and whether dk and dv are needed.
        """
        q = of_rows[2]
        assert q is not None, "q is there"
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)

        def compute(pieces: Iterable[Piece], keys: Tensor, gradient: Tensor) -> None:
            for piece in pieces:
                rows = [None if x is None else x[:, piece.rows] for x in of_rows]
                of_keys = [x[:, piece.keys] for x in _keys_and_values(keys)]
                parts = _calls.backward(piece, rows, of_keys, self.scale, needs)
                if needs[0]:
                    dq[:, piece.rows] += parts[0]
                if needs[1]:
                    for place, part in zip(_keys_and_values(gradient), parts[1:], strict=False):
                        place[:, piece.keys] += part

        total = torch.zeros_like(own, dtype=wide)
        first, last = halves(self.steps[0].pieces)
        coming = self.start(own, 1)
        leaving: tuple[Step, _exchange.Flight] | None = None
        compute(first, own, total)
        for number, step in enumerate(self.steps[1:], 1):
            assert coming is not None, "each step but the first is started"
            keys, coming = coming.wait(), self.start(own, number + 1)
            gradient = torch.zeros_like(keys, dtype=wide)
            compute(step.pieces, keys, gradient)
            if needs[1]:
                self._add(total, leaving)
                name = f"pass_kv: gradients of step {number} of {len(self.steps) - 1}"
                # Summed in fp32, and rounded once for each step.
                leaving = step, _exchange.send_back(gradient.to(q.dtype), step, self.group, name)
        compute(last, own, total)
        self._add(total, leaving)
        return dq, total

    @staticmethod
    def _add(total: Tensor, leaving: tuple[Step, _exchange.Flight] | None) -> None:
        if leaving is not None:
            step, flight = leaving
            _exchange.add(total, flight.wait(), step)


class PassKV(torch.autograd.Function):
    """Differentiable `Pass`: q `[B, L, Hq, D]`, k and v to out and lse."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, way: Pass) -> tuple[Tensor, Tensor]:
        # [tokens, B, 2, Hkv, D]: a message is some of the first dimension.
        own = torch.stack([k, v], 2).movedim(1, 0).contiguous()
        out, lse = way.forward(q, own)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, own, out, lse)
        ctx.way = way
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Context, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        q, own, out, lse = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand_as(out)
        need_q, *need_kv = ctx.needs_input_grad[:3]
        dq, total = ctx.way.backward((dout, dlse, q, out, lse), own, (need_q, any(need_kv)))
        dk, dv = _keys_and_values(total.to(own.dtype))
        return (
            dq.to(q.dtype) if need_q else None,
            dk if need_kv[0] else None,
            dv if need_kv[1] else None,
            None,
        )


def _keys_and_values(both: Tensor) -> tuple[Tensor, Tensor]:
    """`[tokens, B, 2, Hkv, D]` as two views `[B, tokens, Hkv, D]`."""
    k, v = both.movedim(0, 1).unbind(2)
    return k, v
