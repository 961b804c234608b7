"""The case that times how a mask is made of q and k: pooling, scores, top-k, lists of blocks."""

from __future__ import annotations

import torch

from benchmarks.cases.case import Case


def pooled_scores(case: Case, q, k, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, query blocks, key blocks]: of the means of the blocks; heads_q is heads_kv."""
    blocks = case.lists.block_q, case.lists.block_kv
    q, k = (
        x.unflatten(1, (-1, block)).mean(2, dtype=dtype).transpose(1, 2)
        for x, block in zip((q, k), blocks, strict=True)
    )
    return q @ k.mT


def select(case: Case, q, k, v):
    """The op is all of the way from q and k to a BlockMask."""
    from sparse_fmha import BlockGrid, selection

    lists = case.lists
    width = lists.width(case.length)

    def op():
        grid = BlockGrid.of(q, k, lists.block_q, lists.block_kv)
        return grid.mask(selection.top_k_blocks(selection.block_scores(q, k, grid), width), width)

    return op


class Oracle:
    """The sum of the scores that are chosen in each row, next to the largest one there can be.

    Which of two equal scores is chosen does not matter to it. In fp64, of the first and last head.
    """

    def __init__(self, case: Case, q, k, v) -> None:
        self._heads = sorted({0, case.heads_q - 1})
        self._width = case.lists.width(case.length)
        q, k = (x[-1:, :, self._heads] for x in (q, k))
        self._scores = pooled_scores(case, q, k, torch.float64)
        self._best = self._scores.topk(self._width).values.sum(-1)

    def error(self, mask) -> dict[str, float]:
        """As errors.Oracle, of the sums of the rows; infinite where a list is not well made."""
        counts, indices = (x[-1:, self._heads] for x in (mask.counts, mask.indices))
        indices = indices[..., : self._width].long()
        inside = (indices >= 0).all() and (indices < self._scores.shape[-1]).all()
        if not ((counts == self._width).all() and inside and (indices.diff() > 0).all()):
            return {"max_abs": float("inf"), "rel_rms": float("inf")}
        difference = self._scores.gather(-1, indices).sum(-1) - self._best
        return {
            "max_abs": difference.abs().max().item(),
            "rel_rms": (difference.norm() / self._best.norm()).item(),
        }
