"""Inputs of which a given share of the key tiles can be skipped."""

from __future__ import annotations

import torch

import sparse_fmha
from benchmarks.cases.case import Case

TILE_K = 80  # keys of a tile of the kernels that skip, at head dim 128
THRESHOLD = 0.01
HEIGHT = 5.0  # of high tiles, in natural log units; low ones are as far below zero


def shape_scores(
    q: torch.Tensor, k: torch.Tensor, percent: int, seed: int, together: int = 1
) -> None:
    """Changes q and k so that a share of the tiles lie 10 units below the others.

    All queries of a head look in one direction, and the keys of a tile lie along it together. The
    last tile, which full attention visits first, is a high one; under a causal mask a row's first
    tile may be low, and counts until a high one comes.

    Args:
        q: `[B, L, Hq, D]`. k: `[B, L, Hkv, D]`.
        percent: of the tiles.
        together: how many tiles next to each other are all low or all high.
    """
    generator = torch.Generator(q.device).manual_seed(seed + 1)
    length, heads_kv, head_dim = k.shape[1:]

    def rand(*shape: int, normal: bool = False) -> torch.Tensor:
        draw = torch.randn if normal else torch.rand
        return draw(*shape, generator=generator, device=q.device)

    way = torch.nn.functional.normalize(rand(heads_kv, head_dim, normal=True), dim=-1)
    run = TILE_K * together
    low = rand(-(-length // run)) < percent / 100
    low[-1] = False
    along = torch.where(low, -HEIGHT, HEIGHT).repeat_interleave(run)[:length, None, None]
    toward = (head_dim**0.5 * way).repeat_interleave(q.shape[2] // heads_kv, 0)
    q.mul_(0.05).add_(toward.to(q.dtype))
    k.mul_(0.2).add_((along * way).to(k.dtype))


def share(case: Case, q, k, v) -> float:
    """Of the visited tiles those that are skipped, by the library's own count."""
    _, stats = sparse_fmha.attention(
        q, k, v, causal=case.causal, skip_threshold=THRESHOLD, return_stats=True
    )
    return (stats.skipped.sum() / stats.visited.sum()).item()
