"""Error of a result against exact attention in fp64, on a slice of heads and query rows."""

from __future__ import annotations

import torch

from benchmarks.cases import block_lists, grids
from benchmarks.cases.case import Case
from sparse_fmha import reference

ROWS = 199  # a prime: even steps through a grid meet every part of every axis


class Oracle:
    """The exact result of the last batch's first and last head at rows spread over the length.

    On the device of the tensors: the scores are two heads of a few hundred rows.
    """

    def __init__(self, case: Case, q, k, v) -> None:
        count = min(ROWS, case.length)
        rows = torch.linspace(0, case.length - 1, count, device="cpu")
        self._rows = rows.round().long().to(q.device)
        self._heads = sorted({0, case.heads_q - 1})
        group = case.heads_q // case.heads_kv
        heads_kv = [head // group for head in self._heads]
        k, v = (x[-1:, :, heads_kv] for x in (k, v))
        self._out, _ = reference.attention(self._slice(q), k, v, self._visible(case))

    def _visible(self, case: Case) -> torch.Tensor:
        if case.window:
            return grids.row_masks(case.axes, self._rows)
        if case.lists:
            heads = torch.tensor(self._heads, device=self._rows.device)
            return block_lists.row_masks(case, heads, self._rows)
        keys = torch.arange(case.length, device=self._rows.device)
        if case.causal:
            return keys <= self._rows[:, None]
        return torch.ones(1, case.length, dtype=torch.bool, device=keys.device)

    def _slice(self, x: torch.Tensor) -> torch.Tensor:
        return x[-1:, :, self._heads][:, self._rows]

    def error(self, out: torch.Tensor) -> dict[str, float]:
        """Largest difference, and the root mean square of it relative to that of the result."""
        difference = self._slice(out).double() - self._out
        return {
            "max_abs": difference.abs().max().item(),
            "rel_rms": (difference.norm() / self._out.norm()).item(),
        }
