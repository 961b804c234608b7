"""Error of a result against exact attention in fp64, on a slice of heads and query rows."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from sparse_fmha import reference

ROWS = 32


class Oracle:
    """The exact result of the last batch's first and last head at rows spread over the length."""

    def __init__(self, case: Case, q, k, v) -> None:
        count = min(ROWS, case.length)
        self._rows = torch.linspace(0, case.length - 1, count).round().long()
        self._heads = sorted({0, case.heads_q - 1})
        group = case.heads_q // case.heads_kv
        heads_kv = [head // group for head in self._heads]
        k, v = (x[-1:, :, heads_kv].cpu() for x in (k, v))
        self._out, _ = reference.attention(self._slice(q), k, v, self._visible(case))

    def _visible(self, case: Case) -> torch.Tensor:
        if case.window:
            return reference.neighborhood_mask(case.grid, case.window)[self._rows]
        keys = torch.arange(case.length)
        if case.causal:
            return keys <= self._rows[:, None]
        return torch.ones(len(self._rows), case.length, dtype=torch.bool)

    def _slice(self, x: torch.Tensor) -> torch.Tensor:
        return x[-1:, :, self._heads][:, self._rows.to(x.device)].cpu()

    def error(self, out: torch.Tensor) -> dict[str, float]:
        """Largest difference, and the root mean square of it relative to that of the result."""
        difference = self._slice(out).double() - self._out
        return {
            "max_abs": difference.abs().max().item(),
            "rel_rms": (difference.norm() / self._out.norm()).item(),
        }
