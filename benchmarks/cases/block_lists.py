"""Block lists drawn at random: the masks of the bs cases, and what they mean row by row.

A case says how many blocks of key tokens are listed, exactly, so the pairs that count as useful are
known without a mask; the counts of the rows are left to chance, or are what the kind of the lists
says. Nothing here is shared with the kernels or with sparse_fmha.reference.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

KINDS = (
    "random",  # any blocks of a head
    "uniform",  # as many in each row
    "heavy",  # a tenth of the rows hold half of the blocks
    "similar",  # as many in each row; neighboring rows list mostly the same, distant ones do not
    "partial",  # random, and of each listed block half of the pairs are visible
    "selected",  # the blocks with the largest pooled scores
)


@dataclass(frozen=True)
class Lists:
    """How the (query, key) blocks of each head are listed; lengths are multiples of the blocks."""

    block_q: int
    block_kv: int
    density: float  # listed blocks of a head over all of them
    kind: str = "random"

    def grid(self, length: int) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        for block in (self.block_q, self.block_kv):
            if length % block:
                raise ValueError(f"length {length} is no multiple of the block of {block} tokens")
        return length // self.block_q, length // self.block_kv

    def width(self, length: int) -> int:
        """Blocks in each row where all rows have as many: what is selected."""
        return max(1, round(self.density * length / self.block_kv))

    def total(self, length: int) -> int:
        """Blocks that are listed in a head."""
        rows, columns = self.grid(length)
        if self.kind == "selected":
            return rows * self.width(length)
        return round(self.density * rows * columns)

    def listed_pairs(self, length: int) -> int:
        return self.total(length) * self.block_q * self.block_kv

    def visible_pairs(self, length: int) -> int:
        return self.listed_pairs(length) // (2 if self.kind == "partial" else 1)

    def row_counts(self, length: int) -> torch.Tensor:
        """Blocks of each row of a head, int64 [rows], where the kind says it."""
        rows, columns = self.grid(length)
        total = self.total(length)
        heads = -(-rows // 10) if self.kind == "heavy" else 0
        parts = [(heads, total // 2), (rows - heads, total - total // 2)] if heads else []
        counts = []
        for size, share in parts or [(rows, total)]:
            counts += [share // size + (i < share % size) for i in range(size)]
        if max(counts) > columns:
            raise ValueError(f"{self}: a row would list {max(counts)} of {columns} blocks")
        return torch.tensor(counts, device="cpu")


class Drawn(NamedTuple):
    blocks: torch.Tensor  # bool [heads, rows, columns]: what is listed
    bits: torch.Tensor | None  # uint8 [heads, rows, width, block_q, block_kv / 8], lowest bit first


@functools.lru_cache(maxsize=1)
def draw(lists: Lists, heads: int, length: int, device: str) -> Drawn:
    """The lists of each head; the same ones at each call. The last are kept: bits can be 1 GB."""
    generator = torch.Generator(device).manual_seed(0)
    rows, columns = lists.grid(length)
    scores = torch.rand(heads, rows, columns, generator=generator, device=device)
    if lists.kind == "similar":
        scores = drifting(heads, rows, columns, generator)
    if lists.kind in ("uniform", "heavy", "similar"):
        order = torch.rand(heads, rows, generator=generator, device=device).argsort(-1)
        counts = lists.row_counts(length).to(device)[order]
        blocks = scores.argsort(-1).argsort(-1) < counts[..., None]
    elif lists.kind in ("random", "partial"):
        chosen = scores.flatten(1).topk(lists.total(length)).indices
        blocks = torch.zeros(heads, rows * columns, dtype=torch.bool, device=device)
        blocks = blocks.scatter_(1, chosen, True).view(heads, rows, columns)
    else:
        raise ValueError(f"lists of kind {lists.kind} are not drawn")
    bits = None
    if lists.kind == "partial":
        width = int(blocks.sum(-1).max())
        shape = rows, width, lists.block_q, lists.block_kv // 8
        table = half_bytes().to(device)
        bits = torch.empty(heads, *shape, dtype=torch.uint8, device=device)
        for one in bits:  # by heads: the random numbers are eight times as large
            one.copy_(table[torch.randint(len(table), shape, generator=generator, device=device)])
    return Drawn(blocks, bits)


def drifting(heads: int, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Normal scores [heads, rows, columns], which have a correlation of 0.95^n for rows n apart.

    Of the tenth of the columns with the largest scores, two neighboring rows have about three
    quarters in common.
    """
    kept = 0.95
    scores = torch.randn(
        heads, rows, columns, generator=generator, device=generator.device, dtype=torch.float32
    )
    for i in range(1, rows):
        scores[:, i].mul_(math.sqrt(1 - kept**2)).add_(scores[:, i - 1], alpha=kept)
    return scores


def half_bytes() -> torch.Tensor:
    """The bytes of which four bits are set."""
    bits = itertools.combinations(range(8), 4)
    numbers = [sum(1 << i for i in four) for four in bits]
    return torch.tensor(numbers, dtype=torch.uint8, device="cpu")


def compact(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [...] and ascending indices [..., columns] of what is set in each row, int32.

    Behind a row's count are the indices of what is not set.
    """
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32), indices


def mask(case):
    """The sparse_fmha.BlockMask of a case."""
    from sparse_fmha import BlockMask

    lists = case.lists
    drawn = draw(lists, case.heads_q, case.length, case.device)
    counts, indices = (x[None] for x in compact(drawn.blocks))
    sizes = case.length, case.length, lists.block_q, lists.block_kv
    if drawn.bits is None:
        return BlockMask(counts, indices, *sizes)
    width = drawn.bits.shape[2]
    return BlockMask(
        torch.zeros_like(counts), indices[..., :1].contiguous(), *sizes, partial_counts=counts,
        partial_indices=indices[..., :width].contiguous(), partial_bits=drawn.bits[None],
    )  # fmt: skip


def slots(blocks: torch.Tensor) -> torch.Tensor:
    """Where in its row's list each block is, int32 like blocks; of what is not listed any place."""
    return (blocks.cumsum(-1, dtype=torch.int32) - 1).clamp(min=0)


def row_masks(case, heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Bool [heads, rows, length]: what these rows of these heads see."""
    lists = case.lists
    drawn = draw(lists, case.heads_q, case.length, case.device)
    h, n = heads[:, None], rows // lists.block_q
    seen = drawn.blocks[h, n][..., None]
    if drawn.bits is not None:
        place = slots(drawn.blocks)[h, n].long()
        own = drawn.bits[h[..., None], n[:, None], place, (rows % lists.block_q)[:, None]]
        places = torch.arange(8, dtype=torch.uint8, device=own.device)
        seen = seen & ((own[..., None] >> places) & 1).flatten(-2).bool()
    return seen.expand(*seen.shape[:3], lists.block_kv).flatten(2)
