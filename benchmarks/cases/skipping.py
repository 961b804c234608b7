"""Inputs of which a given share of the key tiles can be skipped."""

from __future__ import annotations

import torch

import sparse_fmha
from benchmarks.cases.case import Case

TILE_K = 80  # keys of a tile of the kernels that skip, at head dim 128
THRESHOLD = 0.01
HEIGHT = 5.0  # of high tiles, in natural log units; low ones are as far below zero


def shape_scores(case: Case, q: torch.Tensor, k: torch.Tensor, seed: int) -> None:
    """Changes q and k so that `case.skip` percent of the tiles lie 10 units below the others.

    All queries of a head look in one direction, and the keys of a tile lie along it together. The
    last tile, which full attention visits first, is a high one; under a causal mask a row's first
    tile may be low, and counts until a high one comes.
    """
    generator = torch.Generator(case.device).manual_seed(seed + 1)

    def rand(*shape: int, normal: bool = False) -> torch.Tensor:
        draw = torch.randn if normal else torch.rand
        return draw(*shape, generator=generator, device=case.device)

    way = torch.nn.functional.normalize(rand(case.heads_kv, case.head_dim, normal=True), dim=-1)
    low = rand(-(-case.length // TILE_K)) < case.skip / 100
    low[-1] = False
    along = torch.where(low, -HEIGHT, HEIGHT).repeat_interleave(TILE_K)[: case.length, None, None]
    toward = (case.head_dim**0.5 * way).repeat_interleave(case.heads_q // case.heads_kv, 0)
    q.mul_(0.05).add_(toward.to(q.dtype))
    k.mul_(0.2).add_((along * way).to(k.dtype))


def share(case: Case, q, k, v) -> float:
    """Of the visited tiles those that are skipped, by the library's own count."""
    _, stats = sparse_fmha.attention(
        q, k, v, causal=case.causal, skip_threshold=THRESHOLD, return_stats=True
    )
    return (stats.skipped.sum() / stats.visited.sum()).item()
