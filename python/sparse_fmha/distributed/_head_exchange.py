"""Exchanges tokens of all heads for some heads of all tokens, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha.distributed import _collectives, _transfers

Lengths = tuple[int, ...] | None  # tokens of each rank; None if all have as many


@dataclass(frozen=True)
class HeadExchange:
    """The messages of `ulysses`. Each is started, and waited for by the function returned.

    Attributes:
        under_compute: messages travel until they are waited for. Else they have arrived when the
            start returns, which torch.compile can trace.
    """

    group: dist.ProcessGroup
    rank: int
    world: int
    under_compute: bool

    def to_heads(
        self, parts: Sequence[Tensor], lengths: Lengths, name: str
    ) -> Callable[[], Sequence[Tensor]]:
        """Exchanges each `[B, own tokens, world, heads, D]` for `[B, tokens, heads, D]`.

        They travel in one message. The results are strided views of one tensor.
        """
        heads = [x.shape[3] for x in parts]
        sent = torch.cat([x.movedim(2, 0) for x in parts], 3)
        _, batch, own, *tail = sent.shape
        if lengths is None:
            wait = self._send(sent, None, name)
            # [world, B, own tokens, heads, D], already in order if B is 1.
            return lambda: _split(wait().movedim(0, 1).flatten(1, 2), heads)
        size = batch * tail[0] * tail[1]
        sizes = [length * size for length in lengths]
        wait = self._send(sent.flatten(), ([own * size] * self.world, sizes), name)

        def joined() -> Sequence[Tensor]:
            received = wait()
            if batch == 1:
                whole = received.view(1, sum(lengths), *tail)
            else:
                blocks = zip(received.split(sizes), lengths, strict=True)
                whole = torch.cat([x.view(batch, length, *tail) for x, length in blocks], 1)
            return _split(whole, heads)

        return joined

    def to_tokens(self, x: Tensor, lengths: Lengths, name: str) -> Callable[[], Tensor]:
        """Exchanges `[B, tokens, heads, ...]` for `[world, B, own tokens, heads, ...]`."""
        if lengths is None:
            return self._send(x.unflatten(1, (self.world, -1)).movedim(1, 0), None, name)
        batch, _, *tail = x.shape
        size, own = batch * math.prod(tail), lengths[self.rank]
        sent = torch.cat([part.flatten() for part in x.split(lengths, 1)])
        splits = [length * size for length in lengths], [own * size] * self.world
        wait = self._send(sent, splits, name)
        return lambda: wait().view(self.world, batch, own, *tail)

    def _send(self, sent: Tensor, splits: _collectives.Splits, name: str) -> Callable[[], Tensor]:
        if self.under_compute:
            return _transfers.all_to_all(sent, self.group, name, splits).wait
        received = _collectives.all_to_all(sent, self.group, name, splits)
        return lambda: received


def _split(whole: Tensor, heads: list[int]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = whole.split(heads, 2)
    return parts
