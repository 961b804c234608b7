"""The best cubes of each cube of a video, by their means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_instance, check_number, check_q_and_k
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns.cubes import CubeOrder
from sparse_fmha.selection import pooled_scores, top_k_blocks


def cube_top_k(
    q: Tensor,
    k: Tensor,
    order: CubeOrder,
    *,
    keep: float | Sequence[float] = 0.25,
    scale: float | None = None,
) -> BlockMask:
    """Returns the mask of the cubes with the largest products of means, for tokens in cube order.

    Each cube I sees the `max(1, floor(keep * cubes))` cubes J with the largest
    `scale * mean of q over I . mean of k over J`. Blocks before or after the grid, such as text,
    see all and are seen by all.

    Source: the backend "cube sparse" of SGLang for MiniMax-H3: cubes of 4 x 4 x 4 tokens, with a
    share for each step of the model that falls from 1 (dense) over 0.35 to 0.05. VSA without its
    coarse branch is the same choice.

    Args:
        q: `[B, tokens, Hq, D]`, not permuted. k: `[B, tokens, Hkv, D]`.
        order: of these tokens, on their device; see `nabla` for how it is used.
        keep: share of the cubes, 0 to 1; a sequence has one for each head of q.
        scale: of q.k. Its size has no effect, its sign has.

    Returns:
        A mask of `order.length` queries and keys, with lists for each batch entry and head, built
        without waiting for the device.

    Raises:
        ValueError, TypeError: tensors do not match the order, or a number is not allowed.
    """
    check_instance("order", order, CubeOrder)
    check_q_and_k(q, k)
    cubes = math.prod(order.cubes)
    by_head = isinstance(keep, Sequence) and not isinstance(keep, str)
    shares: Sequence[float] = keep if by_head else [keep]  # type: ignore[assignment, list-item]
    counts = [
        max(1, math.floor(check_number("keep", share, 0, 1) * cubes + 1e-9)) for share in shares
    ]
    with torch.no_grad():
        queries, keys = (order.means(x)[:, order.inside] for x in (q, k))
        scores = pooled_scores(queries, keys, scale=scale)
        chosen = top_k_blocks(scores, counts if by_head else counts[0])
    alone = not order.before and not order.after  # other blocks see all
    return order.mask(order.with_others(chosen), max(counts) if alone else None)
