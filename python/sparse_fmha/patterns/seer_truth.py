"""Training target of SeerAttention's gate: block maxima of the softmax map."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import plain_ints
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.selection.reductions import score_sums


@torch.no_grad()
@plain_ints
def seer_ground_truth(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> Tensor:
    """Returns the row-normalized block maxima of the attention map.

        M[I, J] = max over i in block I, j in block J of softmax(scale * q k^T)[i, j],
        T[I, J] = M[I, J] / sum over J of M[I, J].

    The map is never stored as a whole; `score_sums` says how much memory its slices take. Source:
    Gao et al. 2024, "SeerAttention", arXiv:2410.13276; its blocks are 64x64.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention (after RoPE). k: `[B, Lkv, Hkv, D]`.
        causal: query i sees key j only if `j <= i + Lkv - Lq`.
        scale: scale of q.k; default `D**-0.5`.
        block_q, block_kv: 64 or 128, and 16, 32, 64 or 128.

    Returns:
        fp32 `[B, Hq, nQ, nK]`; each row sums to 1, or is 0 if its queries see no key. No gradients.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=causal)
    truth = score_sums(
        q, k, reduce="blocks_max", causal=grid.causal, scale=scale, block_q=block_q,
        block_kv=block_kv,
    )  # fmt: skip
    total = truth.sum(-1, keepdim=True)
    return truth / torch.where(total > 0, total, 1)
