"""Longformer: a dilated window and global tokens, token-exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_collection, check_int, plain_ints
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_checks import check_sizes
from sparse_fmha.masks.block_lists import ABSENT, build_lists, distinct
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._static import Lists, from_rules, replace_rows


@plain_ints
def longformer(
    length: int,
    *,
    window: int = 512,
    dilation: int | Sequence[int] = 1,
    global_tokens: Sequence[int] = (0,),
    causal: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Returns the mask of Longformer: a sliding window, optionally dilated, and global tokens.

    Query i sees key j where

        |i - j| <= dilation * window / 2  and  (i - j) mod dilation == 0,

    or i or j is global: a global token sees all tokens and is seen by all. With `causal`, also
    `j <= i`. Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer",
    arXiv:2004.05150, section 3.1; defaults: window 512, no dilation, [CLS] (token 0) global. In the
    paper, global tokens have separate projections.

    Partial blocks have bitmasks of `block_q * block_kv` bits. All lists are as wide as the longest
    one, so a global token in a block with other tokens needs bitmasks for all pairs of blocks:
    `length**2 / 8` bytes for each list. With dilation, all blocks of the window are partial.

    Args:
        length: number of tokens, of queries and keys.
        window: even, at least 2; half of it on each side.
        dilation: at least 1; an int for all query heads, or a sequence with one for each.
        global_tokens: positions; negative ones count from the end.
        causal: as in `BlockMask`.
        block_q, block_kv, device: block sizes and device of the mask.

    Raises:
        ValueError, TypeError: a size or position is not allowed.
    """
    check_collection("global_tokens", global_tokens)
    check_int("window", window, 2)
    if window % 2:
        raise ValueError(f"window must be even, half for each side, got {window}")
    dilations = list(dilation) if isinstance(dilation, Sequence) else [dilation]
    if not dilations:
        raise ValueError("dilation must have one entry for each query head, got none")
    for entry in dilations:
        check_int("dilation", entry, 1)
    check_sizes(length, length, block_q, block_kv, causal)
    every = torch.zeros(length, dtype=torch.bool, device="cpu")
    for token in global_tokens:
        if not -length <= check_int("global_tokens", token, -length) < length:
            raise ValueError(f"global_tokens must be less than the {length} tokens, got {token}")
        every[token] = True
    sizes = (length, length, block_q, block_kv)
    blocks = _Blocks(every, causal, *sizes[2:])
    made = [blocks.lists(entry, window // 2) for entry in dilations]
    full, partial = (_stack(lists) for lists in zip(*made, strict=True))
    every = every.to(device)

    def rule(entry: int) -> Callable[[Tensor, Tensor], Tensor]:
        def visible(q: Tensor, k: Tensor) -> Tensor:
            apart = q - k
            near = (apart.abs() <= entry * (window // 2)) & (apart % entry == 0)
            return near | every[q] | every[k]

        return visible

    rules = [rule(entry) for entry in dilations]
    special = (blocks.some_rows, blocks.some_columns)
    return from_rules(rules, full, partial, *special, *sizes, causal, device)


class _Blocks:
    """Finds full and partial blocks, on the CPU."""

    def __init__(self, every: Tensor, causal: bool, block_q: int, block_kv: int) -> None:
        self.causal, self.length = causal, len(every)
        self.block_q, self.block_kv = block_q, block_kv
        sizes = (self.length, self.length, block_q, block_kv)
        self.reached = block_lists.reached(*sizes, causal, every.device)
        # Blocks with at least one global token, and blocks whose tokens are all global.
        self.some_rows, self.whole_rows = _blocks_of(every, block_q)
        self.some_columns, self.whole_columns = _blocks_of(every, block_kv)

    def lists(self, dilation: int, half: int) -> tuple[Lists, Lists]:
        """Returns the lists of full and of partial blocks of one head."""
        reach = dilation * half
        rows = torch.arange(len(self.some_rows), device="cpu")
        ahead = 0 if self.causal else reach
        begin = (rows * self.block_q - reach).clamp(min=0) // self.block_kv
        end = ((rows + 1) * self.block_q - 1 + ahead) // self.block_kv + 1
        width = int((end - begin).max()) if len(rows) else 0
        band = torch.arange(min(width, len(self.some_columns)), device="cpu")
        others = self.some_columns.nonzero()[:, 0]

        def near(some: Tensor) -> Tensor:
            columns = [begin[some, None] + band, others.expand(len(some), -1)]
            return torch.cat(columns, 1)

        full, partial = self._kinds(rows, near, len(band) + len(others), dilation, half)
        whole = self.some_rows.nonzero()[:, 0]
        if len(whole):
            every = torch.arange(len(self.some_columns), device="cpu")
            kinds = self._kinds(
                whole, lambda some: every.expand(len(some), -1), len(every), dilation, half
            )
            pairs = zip((full, partial), kinds, strict=True)
            full, partial = (replace_rows(old, whole, new) for old, new in pairs)
        return full, partial

    def _kinds(
        self,
        rows: Tensor,
        candidates: Callable[[Tensor], Tensor],
        columns: int,
        dilation: int,
        half: int,
    ) -> tuple[Lists, Lists]:
        """Returns lists of full and of partial blocks among the candidates `[n, columns]`."""

        def make(kind: str) -> Lists:
            def kept(part: slice) -> tuple[Tensor, Tensor]:
                some = rows[part]
                numbers = candidates(some)
                numbers, there = distinct(numbers, numbers < self.reached[some, None])
                at = numbers.masked_fill(~there, 0)
                seen, whole = self._seen(some[:, None], at, dilation, half)
                return at, there & seen & (whole if kind == "full" else ~whole)

            cpu = rows.device
            return _narrow(build_lists(kept, 1, len(rows), columns, columns, cpu))

        return make("full"), make("partial")

    def _seen(
        self, rows: Tensor, columns: Tensor, dilation: int, half: int
    ) -> tuple[Tensor, Tensor]:
        """Returns whether a block has any pair visible, and whether it has all."""
        reach = dilation * half
        first_q, first_k = rows * self.block_q, columns * self.block_kv
        last_q = (first_q + self.block_q).clamp(max=self.length) - 1
        last_k = (first_k + self.block_kv).clamp(max=self.length) - 1
        least, most = first_q - last_k, last_q - first_k
        low = least.clamp(min=0 if self.causal else -reach)
        near = low <= most.clamp(max=reach) // dilation * dilation
        inside = (most <= reach) & (dilation == 1)
        if not self.causal:
            inside = inside & (least >= -reach)
        some = near | self.some_rows[rows] | self.some_columns[columns]
        return some, inside | self.whole_rows[rows] | self.whole_columns[columns]


def _blocks_of(every: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns blocks with at least one global token, and blocks with only global tokens."""
    missing = -len(every) % block
    some, whole = (
        torch.nn.functional.pad(every, (0, missing), value=value).view(-1, block)
        for value in (False, True)
    )
    return some.any(1), whole.all(1)


def _narrow(lists: tuple[Tensor, Tensor]) -> Lists:
    """Narrows lists to the width of the longest one."""
    counts, indices = lists
    width = int(counts.max()) if counts.numel() else 0
    return Lists(counts, indices[..., :width].contiguous())


def _stack(lists: Sequence[Lists]) -> Lists:
    """Stacks the lists of all heads, as wide as the widest."""
    width = max(each.indices.shape[-1] for each in lists)
    padded = [
        torch.nn.functional.pad(each.indices, (0, width - each.indices.shape[-1]), value=ABSENT)
        for each in lists
    ]
    return Lists(torch.cat([each.counts for each in lists]), torch.cat(padded))
