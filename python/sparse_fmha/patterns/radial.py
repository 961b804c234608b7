"""Radial attention: the farther apart two frames are, the less of them see each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_fmha._checks import check_flag, check_int, check_positive, plain_ints
from sparse_fmha._sizes import CACHED, ceil_div
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask


@plain_ints
def radial(
    frames: int,
    frame_tokens: int,
    *,
    text: int = 0,
    decay: float = 1.0,
    first_frame: bool = False,
    block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Returns the mask of radial attention, for a video of frames and text after it.

    With d the distance of two frames, g the number of bits of d, and n that of `frame_tokens`:
    their tokens at places x and y of the frames see each other iff

        |x - y| <= w, with w = frame_tokens if d <= 1, else max(2**(n - g) * decay, block)
        and d is a multiple of floor(block / 2**(n - g)), if 2**(n - g) < block.

    So the width halves each time the distance doubles, and after it has come down to a block, only
    some frames are seen. With `first_frame` all see the first frame. A pair of blocks is listed
    iff, for some pair of frames, of its keys that see a query more than 60% see more than a third
    of `block` queries. Text sees all and is seen by all, in whole blocks.

    Source: Li et al. 2025, "Radial Attention: O(n log n) Sparse Attention with Energy Decay for
    Long Video Generation", arXiv:2506.19852, and its code: blocks of 128; HunyuanVideo with decay
    1, Wan 2.1 14B with decay 0.2 and `first_frame`; the first 12 of 50 steps are dense, and for Wan
    the first layer. The code leaves out the last block of a frame that reaches one block further
    than its length needs; here all blocks of a frame count.

    Args:
        frames, frame_tokens: at least 1. text: tokens after them, at least 0.
        decay: above 0.
        first_frame: whether all tokens see the first frame.
        block: size of query and key blocks, 64 or 128.
        device: device of the mask.

    Returns:
        A mask of whole blocks, one for all batch entries and heads. Make it once for each length.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """
    for name, number in (("frames", frames), ("frame_tokens", frame_tokens)):
        check_int(name, number, 1)
    check_int("text", text)
    check_flag("first_frame", first_frame)
    decay = check_positive("decay", decay)
    video = frames * frame_tokens
    grid = BlockGrid(video + text, video + text, block, block, device="cpu")
    parts = _parts(frames, frame_tokens, block)
    width, seen = _reach(frames, frame_tokens, decay, block)
    columns = torch.arange(block, device="cpu")
    blocks = grid.none().flatten()
    for rows in parts.split(max(1, CACHED // (len(parts) * block))):
        apart = (rows[:, None, 0] - parts[:, 0]).abs()
        reach = torch.where(seen[apart], width[apart], -1)
        if first_frame:
            reach = torch.where(parts[:, 0] == 0, frame_tokens, reach)
        key = parts[:, 2, None] + columns
        there = key < parts[:, 3, None]
        low, high = rows[:, None, None, 2], rows[:, None, None, 3]
        reach = reach[..., None]
        count = torch.minimum(high - 1, key + reach) - torch.maximum(low, key - reach) + 1
        some = (there & (count > 0) & (reach >= 0)).sum(-1)
        many = (there & (count * 3 > block) & (reach >= 0)).sum(-1)
        pairs = rows[:, None, 1] * grid.shape[1] + parts[:, 1]
        blocks[pairs[many * 10 > some * 6]] = True
    listed = blocks.view(grid.shape)
    if text:
        listed |= grid.tokens(-text)
    return grid.mask(listed, int(listed.sum(-1).max())).to(device)


def _parts(frames: int, frame_tokens: int, block: int) -> Tensor:
    """Returns frame, block, and first and last place in the frame of what blocks have of frames."""
    frame = torch.arange(frames, device="cpu")[:, None] * frame_tokens
    start = frame // block
    number = start + torch.arange(ceil_div(frame_tokens, block) + 1, device="cpu")
    first = (number * block - frame).clamp(min=0)
    end = ((number + 1) * block - frame).clamp(max=frame_tokens)
    index = (frame // frame_tokens).expand(number.shape)
    table = torch.stack([index, number, first, end], -1)
    return table[first < end]


def _reach(frames: int, frame_tokens: int, decay: float, block: int) -> tuple[Tensor, Tensor]:
    """Returns for each distance of frames w, rounded down, and whether any of it is seen."""
    bits = frame_tokens.bit_length()
    widths, seen = [], []
    for d in range(frames):
        length = 2.0 ** (bits - d.bit_length())
        wide = max(length * decay, block)
        widths.append(frame_tokens if d <= 1 else math.floor(wide))
        seen.append(length >= block or d % int(block / length) == 0)
    return torch.tensor(widths, device="cpu"), torch.tensor(seen, device="cpu")
