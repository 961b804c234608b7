"""The op of HiP's tree search; include/sparse_fmha/core/hip_search.h documents what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha._sizes import ceil_div


def search(
    q: Tensor,
    k: Tensor,
    begin: Tensor,
    page_table: Tensor | None,
    *,
    block_q: int,
    sample: int,
    chunks: int,
    granule: int,
    first: int,
    halvings: int,
) -> tuple[Tensor, Tensor]:
    """`hip_search`: columns `[B, Hq, groups, first + chunks * granule]` and counts, as int32.

    Args:
        q: `[B, Lq, Hq, D]`. k: `[B, Lkv, Hkv, D]`, or with a table `[pages, page, Hkv, D]`.
        begin: int32 `[B or 1, groups]`: keys before it are searched.
        page_table: int32 `[B, Hkv or 1, n]`, or None.
    """
    found: tuple[Tensor, Tensor] = torch.ops.sparse_fmha.hip_search(
        q, k, begin, page_table, block_q, sample, chunks, granule, first, halvings
    )
    return found


def register(library: torch.library.Library) -> None:
    """Registers shapes, and that there are no derivatives, as results are positions.

    There is no rule for vmap, which then calls the op for each entry: pages have no batch.
    """
    op = torch.ops.sparse_fmha.hip_search.default
    torch.library.register_fake(op.name(), _shapes)
    derivatives.register_no_derivative(library, op)


def _shapes(
    q: Tensor,
    _k: Tensor,
    _begin: Tensor,
    _page_table: Tensor | None,
    block_q: int,
    _sample: int,
    chunks: int,
    granule: int,
    first: int,
    _halvings: int,
) -> tuple[Tensor, Tensor]:
    lists = q.shape[0], q.shape[2], ceil_div(q.shape[1], block_q)
    columns = q.new_empty((*lists, first + chunks * granule), dtype=torch.int32)
    return columns, q.new_empty(lists, dtype=torch.int32)
