"""BigBird: a window, global blocks and random blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_fmha._pattern_checks import check_int
from sparse_fmha.block_mask import BlockMask
from sparse_fmha.patterns._static import pattern_blocks
from sparse_fmha.selection import top_k_blocks


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
    """The mask of BigBird in blocks (ITC: global tokens are tokens of the sequence).

    Query block I sees the key blocks J with `|I - J| <= window_blocks // 2`, the global blocks,
    and `random_blocks` others, drawn for each head and query block without repetition. A global
    block also sees all blocks. Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer
    Sequences", arXiv:2007.14062, section 2; defaults as BigBird-ITC: blocks of 64, 3 window
    blocks, 2 global ones (first and last, as in its code), 3 random ones. The window does
    not wrap around the ends. The draw is ours: the same seed gives the same mask on every device,
    and not the mask of another implementation.

    Args:
        length: tokens, of queries and keys.
        heads: query heads; without random blocks one list serves all.
        window_blocks: odd, at least 1.
        global_blocks: numbers of blocks, below 0 from the end.
        random_blocks: at least 0; where fewer are left, all of them.
        seed: of the draw.
        block: tokens of a block of the formula, a multiple of `block_q` and `block_kv`.
        block_q, block_kv, device: of the mask.

    Raises:
        ValueError, TypeError: sizes or numbers that are not allowed.
    """
    check_int("length", length, 1)
    check_int("heads", heads, 1)
    check_int("window_blocks", window_blocks, 1)
    check_int("random_blocks", random_blocks)
    check_int("block", block, 1)
    if window_blocks % 2 == 0:
        raise ValueError(f"window_blocks is {window_blocks}; an odd number is needed")
    rows, columns = pattern_blocks(length, length, block, block_q, block_kv, "cpu")
    blocks = -(-length // block)
    number = torch.arange(blocks)
    seen = (number[:, None] - number).abs() <= window_blocks // 2
    for entry in global_blocks:
        if not -blocks <= check_int("global_blocks", entry, -blocks) < blocks:
            raise ValueError(f"global_blocks has {entry}; there are {blocks} blocks")
        seen[entry] = True
        seen[:, entry] = True
    if random_blocks:
        draw = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed))
        seen = seen | top_k_blocks(draw.masked_fill(seen, -torch.inf), random_blocks)
    else:
        seen = seen[None]
    tiles = seen[:, rows, columns].to(device)
    return BlockMask.from_blocks(tiles[None], length, length, block_q, block_kv)
