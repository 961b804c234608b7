"""Quest: the pages of a cache that may hold the largest scores with one new token."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import (
    check_device,
    check_floats,
    check_head_dim,
    check_instance,
    check_int,
    check_integers,
    check_numbers,
    check_shape,
    plain_ints,
)
from sparse_fmha._ops import quest_pages


class PageBounds:
    """The smallest and the largest key of each page of a cache, in each dimension.

    Kept up to date while keys are written, without waiting for the device and without looking at
    the cache again.

    Args:
        pages, page: pages of the cache, and rows of a page.
        heads_kv, head_dim: of the cache.
        dtype, device: of the bounds; the dtype of the keys loses nothing.

    Attributes:
        low, high: `[pages, Hkv, D]`; infinite for a page without keys.

    Raises:
        ValueError, TypeError: a size is below 1 or no int.
    """

    @plain_ints
    def __init__(
        self,
        pages: int,
        page: int,
        heads_kv: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page = check_int("page", page, 1)
        sizes = {"pages": pages, "heads_kv": heads_kv, "head_dim": head_dim}
        # One page more takes what is written to negative rows.
        shape = [check_int(name, size, 1) for name, size in sizes.items()]
        shape[0] += 1
        self._low = torch.full(shape, torch.inf, dtype=dtype, device=device)
        self._high = torch.full(shape, -torch.inf, dtype=dtype, device=device)

    @property
    def low(self) -> Tensor:
        return self._low[:-1]

    @property
    def high(self) -> Tensor:
        return self._high[:-1]

    def write(self, k: Tensor, rows: Tensor) -> None:
        """Takes keys that are written into the cache.

        Args:
            k: `[n, Hkv, D]`.
            rows: int `[n]`, their rows: page * rows of a page + row. Negative ones are ignored.
                What is written to the first row of a page begins the page anew.

        Raises:
            ValueError, TypeError: a shape, dtype or device is not allowed.
        """
        check_floats("k", k)
        check_shape("k", k, ("any", *self._low.shape[1:]))
        check_device("k", k, self._low.device)
        check_numbers("rows", rows, k.shape[:1], self._low.device)
        rows = rows.long()
        last = self._low.shape[0] - 1
        pages = torch.where(rows < 0, last, rows // self.page).clamp(max=last)
        begins = ((rows >= 0) & (rows % self.page == 0)).int()
        begun = torch.zeros(last + 1, dtype=torch.int32, device=k.device)
        begun = begun.scatter_reduce_(0, pages, begins, "amax")[pages, None, None] > 0
        index = pages[:, None, None].expand_as(k)
        for bounds, empty, reduce in (
            (self._low, torch.inf, "amin"),
            (self._high, -torch.inf, "amax"),
        ):
            bounds[pages] = bounds[pages].masked_fill(begun, empty)  # the same for keys of a page
            bounds.scatter_reduce_(0, index, k.to(bounds.dtype), reduce)


@plain_ints
def quest(
    q: Tensor,
    bounds: PageBounds,
    seq_lens: Tensor,
    page_table: Tensor | None = None,
    *,
    budget: int = 1024,
) -> tuple[Tensor, Tensor, int]:
    """Chooses pages for the new token of each request: `blocks` of `decode_attention`.

    With m and M the bounds of a page, its score is an upper bound of its keys' scores,

        sum over d of max(q_d * m_d, q_d * M_d),

    summed over the query heads of a KV head. A head takes the page of the newest token, and of the
    pages before the `budget // page` ones with the largest scores. Source: Tang et al. 2024,
    "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv:2406.10774; pages
    of 16 tokens, and the first two layers dense. The sum over grouped heads and the budget are
    those of Nawrot et al. 2025, arXiv:2504.17768.

    Nothing waits for the device. The scores read 2 / page of the bytes of the keys.

    Args:
        q: `[B, 1, Hq, D]`, Hq a multiple of the bounds' heads.
        bounds: of the cache.
        seq_lens: int `[B]`, with the new token.
        page_table: int `[B, n]`, as in `decode_attention`. None: page i of request b is
            `b * n + i`, as in a contiguous cache.
        budget: tokens, at least one page.

    Returns:
        indices `[B, Hkv, min(budget // page, n) + 1]` and counts `[B, Hkv]`, int32, and page. The
        newest page stands first, then the best ascending, then -1. A page that the table does not
        have is not taken, nor one whose score is NaN; of equal scores the first is.
        `decode_attention` takes blocks of 16, 32, 64 and 128; for other pages see
        `quest_page_table`.

    Raises:
        ValueError, TypeError: a shape does not match, the head dim is none of attention's, or
            budget is below a page.
        RuntimeError: the bounds are fp64 on CUDA.
    """
    check_instance("bounds", bounds, PageBounds)
    check_int("budget", budget, bounds.page)
    width = _width(q, bounds, seq_lens, page_table)
    indices, counts = quest_pages.choose(
        q[:, 0],
        bounds.low,
        bounds.high,
        seq_lens,
        page_table,
        page=bounds.page,
        best=min(budget // bounds.page, width),
    )
    return indices, counts, bounds.page


@plain_ints
def quest_page_table(
    blocks: tuple[Tensor, Tensor, int], seq_lens: Tensor, page_table: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns what `quest` has chosen into pages of each KV head, for pages of any size.

    Args:
        blocks: the result of `quest`.
        seq_lens, page_table: the arguments of `quest`; here the table is needed.

    Returns:
        int32 `page_table` `[B, Hkv, n]`, in ascending order, and `seq_lens` `[B, Hkv]`, the tokens
        that are left, for `decode_attention`.

    Raises:
        ValueError, TypeError: a shape, dtype or device is not allowed.
    """
    indices, counts, page = blocks
    check_integers("blocks[0]", indices)
    check_shape("blocks[0]", indices, ("batch", "heads", "pages"))
    batch, heads = indices.shape[:2]
    check_numbers("blocks[1]", counts, (batch, heads), indices.device)
    check_int("blocks[2]", page, 1)
    check_numbers("seq_lens", seq_lens, (batch,), indices.device)
    check_numbers("page_table", page_table, (batch, "pages"), indices.device)
    width = page_table.shape[1]
    lengths = seq_lens.long().clamp(0, width * page)[:, None]
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    order = torch.where(listed, indices.long(), width).sort(-1).values
    table = page_table[:, None].expand(-1, indices.shape[1], -1)
    chosen = table.gather(-1, order.clamp(0, width - 1)).masked_fill(order == width, -1)
    newest = lengths - (lengths - 1).div(page, rounding_mode="floor") * page
    left = torch.where(counts > 0, (counts - 1) * page + newest, 0)
    return chosen.int(), left.int()


def _width(q: Tensor, bounds: PageBounds, seq_lens: Tensor, page_table: Tensor | None) -> int:
    """Checks the arguments; returns how many pages a request can have."""
    check_floats("q", q, 4, "[batch, 1, heads, head dim]")
    pages, heads, dim = bounds.low.shape
    batch = q.shape[0]
    if q.shape[1] != 1 or q.shape[3] != dim or q.shape[2] % heads:
        raise ValueError(
            f"q must have shape [any, 1, a multiple of {heads}, {dim}], got {list(q.shape)}"
        )
    check_head_dim("head dim of q", dim)
    check_numbers("seq_lens", seq_lens, (batch,), q.device)
    if page_table is None:
        if not batch or pages % batch:
            raise ValueError(
                f"bounds must have a multiple of {batch} pages without a page_table, got {pages}"
            )
        return pages // batch
    check_numbers("page_table", page_table, (batch, "at least 1"), q.device)
    if not page_table.shape[1]:
        raise ValueError(
            f"page_table must have shape [{batch}, at least 1], got {list(page_table.shape)}"
        )
    return page_table.shape[1]
