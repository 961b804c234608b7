"""BigBird: a window, global blocks and random blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_collection, check_int, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks.block_lists import distinct
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._static import Lists, from_pattern, pattern_rows, replace_rows


@plain_ints
def bigbird(
    length: int,
    heads: int,
    *,
    window_blocks: int = 3,
    global_blocks: Sequence[int] = (0, -1),
    random_blocks: int = 3,
    seed: int = 0,
    block: int = 64,
    block_q: int = 64,
    block_kv: int = 64,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Returns the block mask of BigBird (ITC: global tokens are tokens of the sequence).

    Query block I sees the key blocks J with `|I - J| <= window_blocks // 2`, the global blocks,
    and `random_blocks` others, drawn without replacement for each head and query block. A global
    block also sees all blocks. Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer
    Sequences", arXiv:2007.14062, section 2; defaults as in BigBird-ITC: blocks of 64, 3 window
    blocks, 2 global blocks (first and last, as in its code), 3 random blocks. The window does not
    wrap around. A seed gives the same mask on every device, but not the mask of other
    implementations.

    Args:
        length: number of tokens, of queries and keys.
        heads: query heads; without random blocks, one list serves all heads.
        window_blocks: odd, at least 1.
        global_blocks: block numbers; negative ones count from the end.
        random_blocks: at least 0; if fewer blocks are left, all of them.
        seed: seed of the random blocks.
        block: tokens in a block of the formula, a multiple of `block_q` and `block_kv`.
        block_q, block_kv, device: block sizes and device of the mask.

    Raises:
        ValueError, TypeError: a size or block number is not allowed.
    """
    check_collection("global_blocks", global_blocks)
    check_int("length", length, 1)
    check_int("heads", heads, 1)
    check_int("window_blocks", window_blocks, 1)
    check_int("random_blocks", random_blocks)
    check_int("block", block, 1)
    if window_blocks % 2 == 0:
        raise ValueError(f"window_blocks must be odd, got {window_blocks}")
    sizes = (length, length, block, block_q, block_kv)
    in_block = pattern_rows(*sizes, "cpu")
    blocks = ceil_div(length, block)
    for entry in global_blocks:
        if not -blocks <= check_int("global_blocks", entry, -blocks) < blocks:
            raise ValueError(f"global_blocks must be less than the {blocks} blocks, got {entry}")
    everywhere = torch.tensor(
        sorted({entry % blocks for entry in global_blocks}), dtype=torch.int64, device="cpu"
    )
    reach = min(window_blocks // 2, blocks)
    window = torch.arange(-reach, reach + 1, device="cpu")

    def forced(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns window and global blocks of rows `[n, 1]`, ascending where they are set."""
        near = rows + window
        both = torch.cat([near, everywhere.expand(len(rows), -1)], 1)
        return distinct(both, (both >= 0) & (both < blocks))

    check_int("seed", seed, -(1 << 63))
    draw = _draw(*forced(torch.arange(blocks, device="cpu")[:, None]), heads, random_blocks, seed)

    def make(rows: Tensor) -> tuple[Tensor, Tensor]:
        columns, seen = forced(rows)
        drawn = draw[:, rows[:, 0]]
        columns, seen = (x.expand(len(drawn), -1, -1) for x in (columns, seen))
        return distinct(torch.cat([columns, drawn], 2), torch.cat([seen, drawn >= 0], 2))

    columns = len(window) + len(everywhere) + draw.shape[-1]
    lists = from_pattern(make, len(draw), columns, *sizes, False, "cpu")
    whole = torch.isin(in_block, everywhere).nonzero()[:, 0]
    if len(whole):
        every = torch.arange(ceil_div(length, block_kv), dtype=torch.int32, device="cpu")
        counts = torch.full_like(lists.counts[:, whole], len(every))
        lists = replace_rows(lists, whole, Lists(counts, every.expand(*counts.shape, -1)))
    counts, indices = (x.to(device) for x in lists.of_mask())
    return BlockMask(counts, indices, length, length, block_q, block_kv)


def _draw(columns: Tensor, forced: Tensor, heads: int, random_blocks: int, seed: int) -> Tensor:
    """Draws blocks that are not forced, without replacement, for each head and row.

    Uses Floyd's method (Bentley and Floyd 1987, "A sample of brilliance"): the n-th number is drawn
    from the first `left - (random_blocks - n) + 1` blocks, and replaced by the last of these if it
    has been drawn before. Time and memory do not grow with the number of blocks in a row.

    Args:
        columns, forced: ints and bools `[blocks, n]`: forced blocks, ascending.

    Returns:
        int32 `[heads, blocks, random_blocks]`, or `[1, blocks, 0]` without random blocks; negative
        where fewer blocks are left.
    """
    blocks = len(columns)
    random_blocks = min(random_blocks, blocks)
    if not random_blocks:
        return torch.empty(1, blocks, 0, dtype=torch.int32, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    left = blocks - forced.sum(1)
    drawn = torch.full((heads, blocks, random_blocks), -1, dtype=torch.int32, device="cpu")
    for n in range(random_blocks):
        last = (left - random_blocks + n).expand(heads, -1)  # negative if fewer are left
        uniform = torch.rand(heads, blocks, generator=generator, dtype=torch.float64, device="cpu")
        one = torch.minimum((uniform * (last + 1)).long(), last)
        again = (drawn[..., :n] == one[..., None]).any(-1)
        drawn[..., n] = torch.where(again, last, one).int()
    # Convert numbers among blocks that are not forced to block numbers.
    for place in range(columns.shape[1]):
        column, there = columns[:, place, None], forced[:, place, None]
        drawn += there & (drawn >= column)
    return drawn
