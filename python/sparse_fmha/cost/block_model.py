"""Cost of block lists on an H100: stages of keys, counted as the Hopper kernel packs them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha.cost import model
from sparse_fmha.cost.tile_problem import ROWS
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_mask import BlockMask

QUERY_TILE = 128


class StageCosts(NamedTuple):
    """Microseconds per stage on a multiprocessor, fitted to the bs cases of benchmarks/results."""

    full: float
    small: float  # full, with blocks of 16 keys; bound by copies
    masked: float
    own: float  # for 64 of the rows; bound by copies


TILE_US = 4.8
# Measured: D = 128, and full stages at 64. The others are scaled as the costs of neighborhoods.
COSTS = {
    64: StageCosts(1.46, 1.58, 2.19, 1.17),
    96: StageCosts(1.49, 1.63, 2.24, 1.19),
    128: StageCosts(1.49, 1.63, 2.24, 1.19),
    256: StageCosts(1.66, 1.81, 2.20, 1.21),
}


class Stages(NamedTuple):
    """Stages of each query tile of 128 rows, int64 `[B|1, H|1, tiles]`."""

    both: Tensor  # for all 128 rows
    own: Tensor  # for only 64 of them
    masked: Tensor  # how many of these are masked


def count_stages(mask: BlockMask, tile_k: int) -> Stages:
    """Counts stages of `tile_k` keys; reads the lists."""
    full = block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    partials = torch.zeros_like(mask.counts, dtype=torch.int64)
    if mask.partial_counts is not None and mask.partial_indices is not None:
        partials = block_lists.block_map(
            mask.partial_counts, mask.partial_indices, mask.blocks_kv
        ).sum(-1)
    cut = full & _cut_blocks(mask)

    def stages(blocks: Tensor) -> Tensor:
        return -(-(blocks * mask.block_kv) // tile_k)

    if mask.block_q == QUERY_TILE:
        both = stages(full.sum(-1) + partials)
        masked = torch.minimum(stages(cut.sum(-1) + partials), both)
        return Stages(both, torch.zeros_like(both), masked)
    first, second = (_every_other(full, n) for n in (0, 1))
    cut_first, cut_second = (_every_other(cut, n) for n in (0, 1))
    shared = first & second
    both = stages(shared.sum(-1))
    # A consumer masks either none or all of the stages before its own ones.
    cut_shared = (shared & (cut_first | cut_second)).any(-1)
    masked = torch.where(cut_shared, both, 0)
    own = torch.zeros_like(both)
    for n, (alone, alone_cut) in enumerate(
        [(first & ~shared, cut_first), (second & ~shared, cut_second)]
    ):
        partial = _every_other(partials[..., None], n)[..., 0]
        mine = stages(alone.sum(-1) + partial)
        own += mine
        masked += torch.minimum(stages((alone & alone_cut).sum(-1) + partial), mine)
    return Stages(both, own, torch.minimum(masked, both + own))


class BlockSparseCost(NamedTuple):
    us: float
    density: float  # share of blocks listed
    break_even_density: float | None  # where `attention` takes as long; see block_sparse_cost


def block_sparse_cost(
    mask: BlockMask, batch: int, heads: int, head_dim: int, dense_us: float
) -> BlockSparseCost:
    """Predicts `block_sparse_attention` on an H100, against dense attention of `dense_us`.

    The break-even density assumes a fixed cost per query tile and stages proportional to density.
    Near it, lists fill the multiprocessors like full lists; sparser lists, which vary more, may
    fill them better. It is inf if lists of all reachable blocks are still faster, and None for
    lists without blocks.
    """
    groups = query_tiles(mask, batch, heads, head_dim)
    us, density = model.makespan(groups), mask.block_density
    fixed = TILE_US * sum(n for n, _ in groups)
    stages = sum(n * (tile_us - TILE_US) for n, tile_us in groups)
    if not stages:
        return BlockSparseCost(us, density, None)
    every = torch.ones(1, 1, mask.blocks_q, mask.blocks_kv, dtype=torch.bool, device=mask.device)
    sizes = mask.q_len, mask.kv_len, mask.block_q, mask.block_kv
    whole = BlockMask.from_blocks(every, *sizes, causal=mask.causal)
    groups = query_tiles(whole, batch, heads, head_dim)
    filled = sum(n * tile_us for n, tile_us in groups) / model.makespan(
        groups
    )  # in multiprocessors
    break_even = density * (dense_us * filled - fixed) / stages
    if break_even > whole.block_density:
        break_even = math.inf
    return BlockSparseCost(us, density, break_even)


def query_tiles(mask: BlockMask, batch: int, heads: int, head_dim: int) -> list[tuple[int, float]]:
    """Groups query tiles of equal time: (how many, microseconds of each)."""
    row, _, tile_k = next(r for r in ROWS if r[0] >= head_dim)
    costs = COSTS[row]
    full_us = costs.small if mask.block_kv == 16 else costs.full
    stages = Stages(*(count.double() for count in count_stages(mask, tile_k)))
    times = stages.both * full_us + stages.own * max(costs.own, full_us / 2)
    times = times + stages.masked * (costs.masked - costs.full) + TILE_US
    lists = times.shape[0] * times.shape[1]
    times, counts = times.flatten().unique(return_counts=True)
    repeats = batch * heads // max(1, lists)
    return [(n * repeats, us) for n, us in zip(counts.tolist(), times.tolist(), strict=True)]


def _cut_blocks(mask: BlockMask) -> Tensor:
    """Returns bool `[nQ, nK]`: blocks with a hidden pair, cut by causality or the end of keys."""
    rows = mask.blocks_q * mask.block_q
    limits = block_lists.key_limits(mask.q_len, mask.kv_len, mask.causal, rows, mask.device)
    first_row = limits.view(-1, mask.block_q)[:, 0]
    ends = torch.arange(1, mask.blocks_kv + 1, device=mask.device) * mask.block_kv
    return ends > first_row[:, None]


def _every_other(rows: Tensor, first: int) -> Tensor:
    """Returns query blocks first, first + 2, ... of `[..., nQ, n]`; pads an odd nQ with zeros."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, rows.shape[-2] % 2))
    return padded[..., first::2, :]
