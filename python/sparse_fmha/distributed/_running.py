"""Results of attention over more and more of the keys."""

from __future__ import annotations

import torch
from torch import Tensor


class Running:
    """Merges results over disjoint parts of the keys by their lse, in place, in fp32 or fp64.

    A result that covers all rows and stays the only one is returned as it is.
    """

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._wide = torch.promote_types(q.dtype, torch.float32)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Adds the result of some rows over keys that these rows have not had yet."""
        if self._out is None and out.shape[1] == self._q.shape[1]:
            self._out, self._lse = out, lse
            return
        whole_out, whole_lse = self._whole()
        whole_out = self._out = whole_out.to(self._wide)
        before = whole_lse[:, rows]
        # A row that sees none of these keys keeps what it has.
        share = (lse - before).sigmoid().masked_fill_(lse == -torch.inf, 0)
        whole_out[:, rows].lerp_(out.to(self._wide), share.to(self._wide)[..., None])
        torch.logaddexp(before, lse, out=before)

    def result(self) -> tuple[Tensor, Tensor]:
        """out in q's dtype, contiguous, and lse; a row without keys has 0 and -inf."""
        out, lse = self._whole()
        return out.to(self._q.dtype), lse

    def _whole(self) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            self._out = torch.zeros_like(
                self._q, dtype=self._wide, memory_format=torch.contiguous_format
            )
            self._lse = self._q.new_full(self._q.shape[:-1], -torch.inf, dtype=torch.float32)
        return self._out, self._lse
