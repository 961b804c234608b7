"""DraftAttention: the blocks with the largest attention of a video pooled to a draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_instance, check_q_and_k
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns.cubes import CubeOrder
from sparse_fmha.selection import pooled_scores, top_k_blocks
from sparse_fmha.selection.choosing import shares_of


def draft(
    q: Tensor,
    k: Tensor,
    order: CubeOrder,
    *,
    keep: float | Sequence[float] = 0.1,
    scale: float | None = None,
) -> BlockMask:
    """Returns the mask of DraftAttention, for tokens in cube order.

        P_IJ = softmax over J of scale * mean of q over cube I . mean of k over cube J;
        a head keeps the share `keep` of all its pairs (I, J), those with the largest P.

    Rows of a head share one budget, so a row may keep few cubes, or none if all its P are small;
    its queries then see only the blocks outside the grid, or nothing. Blocks before or after the
    grid, such as text, see all and are seen by all.

    Source: "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance" (2025),
    arXiv:2505.14708, and its code: cubes of 8 x 16 tokens of a frame, sparsity 0.9, for
    HunyuanVideo at 33 x 48 x 80 with 256 tokens of text after them. There, all pairs with the last
    P that is kept are kept too.

        order = patterns.CubeOrder((33, 48, 80), (1, 8, 16), after=256, device=q.device)

    Args:
        q: `[B, tokens, Hq, D]`, not permuted. k: `[B, tokens, Hkv, D]`.
        order: of these tokens, on their device; see `nabla` for how it is used.
        keep: share of the pairs, 0 to 1, rounded up; a sequence has one for each head of q.
        scale: default `D**-0.5`.

    Returns:
        A mask of `order.length` queries and keys, with lists for each batch entry and head, built
        without waiting for the device. All scores of a head are sorted together.

    Raises:
        ValueError, TypeError: tensors do not match the order, or a number is not allowed.
    """
    check_instance("order", order, CubeOrder)
    check_q_and_k(q, k)
    with torch.no_grad():
        queries, keys = (order.means(x)[:, order.inside] for x in (q, k))
        shares = pooled_scores(queries, keys, scale=scale, softmax=True)
        shares_of("keep", keep, shares)
        kept = top_k_blocks(shares.flatten(2)[:, :, None], density=keep).view(shares.shape)
    return order.mask(order.with_others(kept))
