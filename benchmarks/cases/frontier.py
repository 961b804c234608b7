"""Masks of published methods at several budgets, for the same causal inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_fmha import BlockMask, StripeMask, patterns
from sparse_fmha.selection import BlockGrid, top_k_blocks

Mask = BlockMask | StripeMask


@dataclass(frozen=True)
class Method:
    """`make(q, k, budget)` for each of the budgets, from the sparsest on."""

    make: Callable[[Tensor, Tensor, float], Mask]
    budgets: Sequence[float]
    kind: str  # what the choice depends on


def _true_blocks(q: Tensor, k: Tensor, density: float) -> BlockMask:
    grid = BlockGrid.of(q, k, 64, 64, causal=True)
    largest = patterns.seer_ground_truth(q, k)
    return grid.mask(top_k_blocks(largest, density=density) | grid.diagonal())


def _streaming(q: Tensor, k: Tensor, share: float) -> BlockMask:
    window = max(1, int(share * k.shape[1] / 2))
    return patterns.streaming_llm(q.shape[1], k.shape[1], window=window, device=q.device)


def _s2(q: Tensor, k: Tensor, stride: float) -> BlockMask:
    return patterns.s2_attention(
        q.shape[1], k.shape[1], q.shape[2], stride=int(stride), device=q.device
    )


def _power(q: Tensor, k: Tensor, blocks: float) -> BlockMask:
    return patterns.power_attention(
        q.shape[1], k.shape[1], local_blocks=int(blocks), block=128, device=q.device
    )


def _vertical_slash(q: Tensor, k: Tensor, share: float) -> StripeMask:
    n = int(share * k.shape[1])
    return patterns.vertical_slash(q, k, vertical=max(64, n // 4), slash=max(64, n))


def _chunks(q: Tensor, k: Tensor, share: float) -> StripeMask:
    keys = max(384, int(share * k.shape[1] / 2))
    return patterns.token_top_k(q, k, keys)


def _hip(q: Tensor, k: Tensor, share: float) -> StripeMask:
    keys = 2 * max(128, int(share * k.shape[1] / 4))  # granules of two
    return patterns.hip(q, k, keys=keys)


def _minference(q: Tensor, k: Tensor, share: float) -> BlockMask:
    return patterns.minference_block_sparse(q, k, top_k=max(1, int(share * k.shape[1] / 128)))


def _ssa(q: Tensor, k: Tensor, share: float) -> BlockMask:
    return patterns.ssa(q, k, blocks=max(2, int(share * k.shape[1] / 32)))


FIXED = "nothing"  # such a mask is made once, like a model's
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
METHODS = {
    "blocks of 64, true maxima": Method(_true_blocks, SHARES, "the whole map"),
    "minference, blocks": Method(_minference, SHARES, "means of blocks"),
    "flexprefill": Method(
        lambda q, k, gamma: patterns.flexprefill_query_aware(q, k, gamma=gamma),
        (0.3, 0.5, 0.7, 0.85, 0.95), "means of blocks",
    ),
    "dhsa, 128x32": Method(
        lambda q, k, density: patterns.dhsa_blocks(q, k, density=density), SHARES, "means of blocks"
    ),
    "vertical-slash": Method(_vertical_slash, SHARES, "the last queries"),
    "top-k tokens": Method(_chunks, SHARES, "means of query blocks"),
    "hip": Method(_hip, SHARES, "a tree search"),
    "ssa": Method(_ssa, SHARES[:4], "means of key blocks, each query"),
    "streaming-llm": Method(_streaming, SHARES, FIXED),
    "s2": Method(_s2, (64, 32, 16, 8, 4), FIXED),
    "power": Method(_power, (2, 4, 8, 16), FIXED),
}  # fmt: skip
