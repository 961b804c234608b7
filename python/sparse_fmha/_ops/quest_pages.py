"""The op of Quest's choice; include/sparse_fmha/core/quest_pages.h documents what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives


def choose(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    *,
    page: int,
    best: int,
) -> tuple[Tensor, Tensor]:
    """`quest_pages`: pages `[B, Hkv, best + 1]`, the newest one first, and counts, as int32.

    Args:
        q: `[B, Hq, D]`.
        low, high: `[pages, Hkv, D]`, bounds of the keys of each page.
        seq_lens: integers `[B]`.
        page_table: integers `[B, n]`; None: page i of request b is `b * n + i`.
        page: tokens of a page. best: pages besides the newest.
    """
    found: tuple[Tensor, Tensor] = torch.ops.sparse_fmha.quest_pages(
        q,
        low,
        high,
        _int32(seq_lens),
        None if page_table is None else _int32(page_table),
        page,
        best,
    )
    return found


def _int32(numbers: Tensor) -> Tensor:
    """Of any integers; those that int32 cannot hold are out of range in it, too."""
    if numbers.dtype == torch.int32:
        return numbers
    return numbers.clamp(-1, 2**31 - 1).int()


def register(library: torch.library.Library) -> None:
    """Registers shapes, and that there are no derivatives, as results are positions.

    There is no rule for vmap, which then calls the op for each entry: pages have no batch.
    """
    op = torch.ops.sparse_fmha.quest_pages.default
    torch.library.register_fake(op.name(), _shapes)
    derivatives.register_no_derivative(library, op)


def _shapes(
    q: Tensor,
    low: Tensor,
    _high: Tensor,
    _seq_lens: Tensor,
    _page_table: Tensor | None,
    _page: int,
    best: int,
) -> tuple[Tensor, Tensor]:
    lists = q.shape[0], low.shape[1]
    indices = q.new_empty((*lists, best + 1), dtype=torch.int32)
    return indices, q.new_empty(lists, dtype=torch.int32)
