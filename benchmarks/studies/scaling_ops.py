"""What benchmarks.studies.scaling measures: functions of a whole sequence, and their tensors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

import sparse_fmha
from sparse_fmha import BlockMask, patterns

BLOCK = 128
TINY = {"length": 1024, "heads": 8, "heads_kv": 4, "head_dim": 16, "dtype": "float32"}
# HunyuanVideo, and what takes its place in --tiny.
GRID, WINDOW = (30, 48, 80), (18, 24, 24)
TINY_GRID, TINY_WINDOW = (4, 16, 16), (3, 5, 5)
ULYSSES, GATHER = ("ulysses", "ulysses in slices"), ("all_gather_kv", "all_gather_kv in slices")
ZIGZAG = ("zigzag", "zigzag in slices")
SDPA, FLEX = "torch", "torch flex"


@dataclass(frozen=True)
class Op:
    """A function of whole tensors, and the ways to run it on several ranks."""

    function: Callable[..., Tensor]
    ways: tuple[str, ...]
    options: dict = field(default_factory=dict)
    masked: bool = False
    on_grid: bool = False
    chooses: bool = False  # by the values, so that its pairs are not known


@dataclass(frozen=True)
class Way:
    """A function of this rank's parts.

    Attributes:
        part: takes this rank's part of a whole tensor.
        call: the function of the parts of q, k and v; within `context`.
        moving: the same with nothing computed, None where that cannot be called.
        backward: whether it has a backward pass.
    """

    part: Callable[[Tensor], Tensor]
    call: Callable[..., Tensor]
    moving: Callable[..., Tensor] | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    backward: bool = True


def even(rank: int, ranks: int) -> Callable[[Tensor], Tensor]:
    """Rank after rank has as many tokens."""
    return lambda x: x.chunk(ranks, 1)[rank].contiguous()


def windows(q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, ...], window: object) -> Tensor:
    grids = (x.unflatten(1, grid) for x in (q, k, v))
    return sparse_fmha.neighborhood_attention(*grids, window).flatten(1, len(grid))


def anchor(q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False) -> Tensor:
    return patterns.anchor_attention(q, k, v).out


def vertical_slash(q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False) -> Tensor:
    return sparse_fmha.stripe_attention(q, k, v, patterns.vertical_slash(q, k))


OPS = {
    "full": Op(sparse_fmha.attention, (*ULYSSES, *GATHER, "pass_kv", SDPA, FLEX)),
    "causal": Op(
        sparse_fmha.attention,
        (*ULYSSES, GATHER[0], *ZIGZAG, "pass_kv", SDPA, FLEX),
        {"causal": True},
    ),
    "block_sparse": Op(
        sparse_fmha.block_sparse_attention, (*ULYSSES, *GATHER, "pass_kv", FLEX), masked=True
    ),
    "windows": Op(windows, ULYSSES, on_grid=True),
    "anchor": Op(anchor, ULYSSES, chooses=True),
    "vertical_slash": Op(vertical_slash, ULYSSES, chooses=True),
}  # fmt: skip


def of_op(op: Op, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the length and the options of an op."""
    grid, window = (TINY_GRID, TINY_WINDOW) if args.tiny else (GRID, WINDOW)
    length = math.prod(grid) if op.on_grid else args.length
    options = op.options | ({"grid": grid, "window": window} if op.on_grid else {})
    return argparse.Namespace(**vars(args) | {"length": length, "options": options})


def tensors(args: argparse.Namespace, device: str) -> list[Tensor]:
    """The same q, k and v on every rank."""
    generator = torch.Generator(device).manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    return [
        torch.randn(
            1, args.length, heads, args.head_dim, generator=generator, device=device, dtype=dtype
        )
        for heads in (args.heads, args.heads_kv, args.heads_kv)
    ]


def random_mask(args: argparse.Namespace, device: str) -> BlockMask:
    """As many blocks in each row of each head, and the same ones on every rank."""
    generator = torch.Generator(device).manual_seed(args.seed)
    rows = args.length // BLOCK
    listed = max(1, round(args.density * rows))
    indices = torch.empty(1, args.heads, rows, listed, dtype=torch.int32, device=device)
    for head in range(args.heads):
        scores = torch.rand(rows, rows, generator=generator, device=device)
        indices[0, head] = scores.topk(listed).indices.sort().values
    counts = torch.full(indices.shape[:3], listed, dtype=torch.int32, device=device)
    return BlockMask(counts, indices, args.length, args.length, BLOCK, BLOCK)


def useful_flops(op: Op, args: argparse.Namespace, mask: BlockMask | None) -> float:
    """Of the visible pairs, forward; 0 where these are not known."""
    pairs = args.length * args.length
    if op.chooses:
        pairs = 0
    elif args.options.get("causal"):
        pairs = args.length * (args.length + 1) // 2
    elif op.on_grid:
        pairs = args.length * math.prod(args.options["window"])
    elif mask is not None:
        pairs = pairs * mask.indices.shape[-1] / mask.blocks_kv
    return 4.0 * args.heads * args.head_dim * pairs
