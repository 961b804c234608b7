"""Published methods at several budgets, for the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_fmha import BlockMask, StripeMask, patterns, score_sums
from sparse_fmha.selection import BlockGrid, top_k_blocks

Mask = BlockMask | StripeMask


@dataclass(frozen=True)
class Method:
    """`make(q, k, budget)` for each of the budgets, from the sparsest on."""

    make: Callable[[Tensor, Tensor, float], Mask]
    budgets: Sequence[float]
    kind: str  # what the choice depends on
    causal: bool = True
    queries: float = 1.0  # the share of the queries, the last ones, that attend


@dataclass(frozen=True)
class Whole:
    """A method without a mask: `attend(q, k, v, budget)` gives out, and the share of the pairs that
    it computes; a pooled pair counts as one."""

    attend: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Callable[[], float]]]
    budgets: Sequence[float]
    kind: str
    causal: bool = True
    queries: float = 1.0


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


def _dhsa_chunks(q: Tensor, k: Tensor, share: float) -> StripeMask:
    chunks = torch.arange(0, k.shape[1] + 32, 32, device=q.device).clamp(max=k.shape[1])[None]
    return patterns.dhsa(q, k, chunks, max(320, int(share * k.shape[1] / 2)), dense_rows=0)


def _psa(q: Tensor, k: Tensor, v: Tensor, factor: float) -> tuple[Tensor, Callable[[], float]]:
    shares = {level: min(1.0, factor * share) for level, share in SHARES_OF_PSA.items()}
    levels = patterns.psa_levels(q, k, shares, causal=True)

    def share() -> float:
        own = levels.float()
        computed = torch.where(own > 0, 1 / own.clamp(min=1), 0).sum((-2, -1)).mean()
        reachable = BlockGrid.of(q, k, 128, 128, causal=True).reachable().sum()
        return (computed / reachable).item()

    return patterns.psa_attention(q, k, v, levels, causal=True), share


def _token_sparse(
    q: Tensor, k: Tensor, v: Tensor, share: float
) -> tuple[Tensor, Callable[[], float]]:
    indices = patterns.token_sparse_indices(q, k, keep=int(share * q.shape[1]))
    kept, length = indices.shape[2], q.shape[1]
    out = patterns.token_sparse_attention(q, k, v, indices=indices)
    return out, lambda: kept * (kept + 1) / (length * (length + 1))


def _grid(q: Tensor, k: Tensor, v: Tensor, stride: float) -> tuple[Tensor, Callable[[], float]]:
    step = int(stride)
    return patterns.mminference_grid_attention(q, k, v, [step]), lambda: (2 - 1 / step) / step


def _anchor(q: Tensor, k: Tensor, v: Tensor, theta: float) -> tuple[Tensor, Callable[[], float]]:
    result, length, rows = patterns.anchor_attention(q, k, v, theta=theta), q.shape[1], 16 * 128

    def share() -> float:
        at = torch.arange(length, device="cpu")
        near = at % rows + 1 + torch.where(at < rows, 0, 2 * 128)
        sizes = torch.full((result.kept.shape[2],), float(rows), device="cpu")
        sizes[-1] -= len(sizes) * rows - length
        distant = (result.kept.cpu().double().mean((0, 1)) * sizes).sum()
        return ((near.sum() + distant) / (length * (length + 1) / 2)).item()

    return result.out, share


def _dma(q: Tensor, k: Tensor, v: Tensor, share: float) -> tuple[Tensor, Callable[[], float]]:
    """With a bias that ranks keys by the last queries, in place of a learned one, and is so small
    that dense attention without it is what the method approximates."""
    length, keep = k.shape[1], max(128, int(share * k.shape[1] / 2))
    found = score_sums(q[:, -64:], k, causal=True)
    found = found.unflatten(1, (k.shape[2], -1)).mean(2)
    bias = found / found.amax(-1, keepdim=True) / 1024
    pairs = keep * length - keep * (keep - 1) // 2
    return patterns.dma_attention(q, k, v, bias, keep), lambda: pairs / (length * (length + 1) / 2)


def _rectified(q: Tensor, k: Tensor, v: Tensor, keep: float) -> tuple[Tensor, Callable[[], float]]:
    plan = patterns.rectified(q, k, keep=keep, theta=0.0)

    def share() -> float:  # the mean of a block is seen once by each of its queries
        pooled = (plan.rest > 0).float().mean().item() / plan.mask.block_kv
        return plan.mask.density + pooled

    return patterns.rectified_attention(q, k, v, plan=plan), share


def _sol(q: Tensor, k: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Callable[[], float]]:
    def share() -> float:
        exact = patterns.sol_blocks(q, k, tau=tau).float().mean().item()
        return exact + (1 - exact) / 64

    return patterns.sol_attention(q, k, v, tau=tau), share


def _light_forcing(q: Tensor, k: Tensor, share: float) -> BlockMask:
    frame = k.shape[1] // FRAMES
    layout = patterns.LightForcingLayout(q.shape[1], k.shape[1], frame, device=q.device)
    return patterns.light_forcing(q, k, layout, sparsity=1 - share)


FRAMES = 16  # of Light Forcing's video, the last two of which are the chunk
SHARES_OF_PSA = {1: 0.05, 2: 0.15, 4: 0.25, 8: 0.5}
FIXED = "nothing"  # such a mask is made once, like a model's
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
METHODS: dict[str, Method | Whole] = {
    "blocks of 64, true maxima": Method(_true_blocks, SHARES, "the whole map"),
    "minference, blocks": Method(_minference, SHARES, "means of blocks"),
    "flexprefill": Method(
        lambda q, k, gamma: patterns.flexprefill_query_aware(q, k, gamma=gamma),
        (0.3, 0.5, 0.7, 0.85, 0.95), "means of blocks",
    ),
    "dhsa, 128x32": Method(
        lambda q, k, density: patterns.dhsa_blocks(q, k, density=density), SHARES, "means of blocks"
    ),
    "dhsa, chunks": Method(_dhsa_chunks, SHARES, "means of chunks"),
    "flexprefill, both branches": Method(
        lambda q, k, gamma: patterns.flexprefill_mask(q, k, gamma=gamma),
        (0.3, 0.5, 0.7, 0.85, 0.95), "means of blocks, the last queries",
    ),
    "psa": Whole(_psa, (0.5, 1.0, 1.5, 2.0), "a sample of the map"),
    "token-sparse": Whole(_token_sparse, (0.2, 0.35, 0.5, 0.7), "the last queries"),
    "grid heads": Whole(_grid, (64, 32, 16, 8, 4), "the last queries"),
    "anchor": Whole(_anchor, (4.0, 8.0, 12.0, 16.0), "near scores"),
    "vertical-slash": Method(_vertical_slash, SHARES, "the last queries"),
    "top-k tokens": Method(_chunks, SHARES, "means of query blocks"),
    "hip": Method(_hip, SHARES, "a tree search"),
    "ssa": Method(_ssa, SHARES[:4], "means of key blocks, each query"),
    "streaming-llm": Method(_streaming, SHARES, FIXED),
    "s2": Method(_s2, (64, 32, 16, 8, 4), FIXED),
    "power": Method(_power, (2, 4, 8, 16), FIXED),
    "dma": Whole(_dma, SHARES, "a bias of keys, from the last queries"),
    "rectified": Whole(_rectified, SHARES, "means of blocks", causal=False),
    "sol": Whole(_sol, (3.0, 2.0, 1.5, 1.0, 0.5), "means of blocks", causal=False),
    "light-forcing": Method(
        _light_forcing, SHARES, "means of frames and blocks", causal=False, queries=2 / FRAMES
    ),
}  # fmt: skip
