"""NABLA: blocks that cover a share of the pooled attention, or are near in the video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_instance, check_number, check_q_and_k, plain_ints
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns.cubes import CubeOrder
from sparse_fmha.selection import pooled_scores, top_p_blocks


@plain_ints
def nabla(
    q: Tensor,
    k: Tensor,
    order: CubeOrder,
    *,
    p: float = 0.9,
    window: Sequence[int] | None = (11, 3, 3),
    scale: float | None = None,
) -> BlockMask:
    """Returns the mask of NABLA, the sparse attention of Kandinsky 5, for tokens in cube order.

        P_IJ = softmax over J of scale * mean of q over block I . mean of k over block J;
        I sees the fewest J with the largest P that add up to p, and the J near it in the video.

    Near are blocks within `window // 2` blocks on every axis ("sliding tile" prior). Blocks before
    or after the grid see all and are seen by all; the models have none.

    Source: "NABLA: Neighborhood Adaptive Block-Level Attention" (2025), arXiv:2507.13546, and its
    code in diffusers, with blocks of 8 x 8 tokens of a frame: p 0.9 (Kandinsky 5; its checkpoints
    have the numbers), p 0.8 and a window of 11 x 7 x 7 blocks (Kandinsky 6, super-resolution).
    There, the block that exceeds p is also taken if it only meets it.

        order = patterns.CubeOrder((frames, height, width), (1, 8, 8), device=q.device)
        mask = patterns.nabla(q, k, order)
        permuted = order.permute(q), order.permute(k), order.permute(v)
        out = order.undo(block_sparse_attention(*permuted, mask))

    Args:
        q: `[B, tokens, Hq, D]`, in the grid's order, not permuted. k: `[B, tokens, Hkv, D]`.
        order: of these tokens, on their device.
        p: share of the probability, 0 to 1.
        window: blocks on each axis, odd, or None.
        scale: default `D**-0.5`.

    Returns:
        A mask of `order.length` queries and keys, with lists for each batch entry and head, built
        without waiting for the device.

    Raises:
        ValueError, TypeError: tensors do not match the order, or a number is not allowed.
    """
    check_instance("order", order, CubeOrder)
    check_q_and_k(q, k)
    check_number("p", p, 0, 1)
    with torch.no_grad():
        shares = pooled_scores(order.means(q), order.means(k), scale=scale, softmax=True)
        blocks = top_p_blocks(shares, p)
    others = order.others()
    blocks |= others | others[:, None]
    if window is not None:
        for n, size in enumerate(window):
            if not size % 2:
                raise ValueError(f"window[{n}] must be odd, got {size}")
        blocks |= order.near(window)
    return order.mask(blocks)
