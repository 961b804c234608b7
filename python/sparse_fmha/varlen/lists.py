"""Attention of packed sequences over block lists."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.attention import block_sparse_attention
from sparse_fmha.masks import packed
from sparse_fmha.masks.block_mask import BlockMask


def over_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    seqused_k: Tensor | None,
    scale: float | None,
    *,
    window: packed.Window = packed.EVERYTHING,
    skip_threshold: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Runs `block_sparse_attention` on the packed dimension, on any device.

    Args:
        window: see `packed.Window`.

    Returns:
        out and lse, as `varlen_attention` returns them.
    """
    sequences = packed.sequences_of(cu_q, cu_k, seqused_k, q.shape[0], k.shape[0])
    mask = BlockMask(**vars(packed.block_mask(sequences, max_q, max_k, causal, window)))
    queries, keys = packed.held_queries(sequences), packed.held_keys(sequences)
    # Tiles have tokens of no sequence, which may hold NaN, and their queries get results.
    q, k, v = (packed.only(held, x)[None] for held, x in ((queries, q), (keys, k), (keys, v)))
    out, lse = block_sparse_attention(
        *(q, k, v, mask),
        scale=scale,
        softcap=softcap,
        skip_threshold=skip_threshold,
        return_lse=True,
    )
    return packed.only(queries, out[0]), torch.where(queries[:, None], lse[0], -torch.inf)
