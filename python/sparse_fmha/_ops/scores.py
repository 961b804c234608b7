"""The ops that reduce scores; csrc/ops/scores.cpp documents what they compute."""

from __future__ import annotations

from torch import Tensor

from sparse_fmha._ops import symbolic


def rows(q: Tensor, k: Tensor, causal: bool, parts: int, scale: float) -> Tensor:
    """`score_rows`: log-sum-exp over ranges of keys, `[B, Hq, parts, Lq]`."""
    result: Tensor = symbolic.call("score_rows", q, k, causal, parts, scale)
    return result


def columns(q: Tensor, k: Tensor, lse: Tensor, causal: bool, scale: float) -> Tensor:
    """`score_columns`: `[B, Hq, Lkv]`."""
    result: Tensor = symbolic.call("score_columns", q, k, lse, causal, scale)
    return result


def diagonals(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """`score_diagonals`, causal: two that are to be added, `[B, Hq, 2, Lkv]`."""
    result: Tensor = symbolic.call("score_diagonals", q, k, lse, scale)
    return result


def blocks(
    of: str,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    causal: bool,
    block_q: int,
    block_kv: int,
    scale: float,
) -> Tensor:
    """`score_block_sums` or `score_block_maxima`: `[B, Hq, nQ, nK]`."""
    name = f"score_block_{of}"
    result: Tensor = symbolic.call(name, q, k, lse, causal, block_q, block_kv, scale)
    return result
