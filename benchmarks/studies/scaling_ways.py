"""The ways of benchmarks.studies.scaling to run an op on several ranks."""

from __future__ import annotations

import argparse
import functools
import math

import torch.distributed as dist
from torch import Tensor

import sparse_fmha
import sparse_fmha.distributed as sd
from benchmarks.studies import scaling_torch
from benchmarks.studies.scaling_ops import FLEX, SDPA, Op, Way, even
from sparse_fmha import BlockMask

SLICES = " in slices"


def divides(ranks: int, args: argparse.Namespace) -> bool:
    """Whether ulysses takes the numbers of heads."""
    return args.heads % ranks == 0 and (args.heads_kv % ranks == 0 or ranks % args.heads_kv == 0)


def possible(op: Op, ranks: int, args: argparse.Namespace) -> list[str]:
    """Those that take the numbers of heads, on this device."""
    return [
        way for way in op.ways
        if (divides(ranks, args) or not way.startswith("ulysses"))
        and (not args.tiny or scaling_torch.runs_on_cpu(way))
    ]  # fmt: skip


def slices(way: str, ranks: int, args: argparse.Namespace) -> int:
    """--slices, or as many as the heads of a rank allow."""
    if not way.endswith(SLICES):
        return 1
    if not way.startswith("ulysses"):
        return math.gcd(args.slices, args.heads_kv)
    heads = args.heads // ranks
    shared = heads // max(args.heads_kv // ranks, 1)
    return next(
        n for n in range(min(args.slices, heads), 0, -1)
        if heads % n == 0 and (heads // n % shared == 0 or shared % (heads // n) == 0)
    )  # fmt: skip


def made(
    way: str, op: Op, mask: BlockMask | None, group: dist.ProcessGroup, args: argparse.Namespace
) -> Way:
    """The way on the ranks of a group."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    common = {"group": group, "validate": False} | args.options
    if way in (SDPA, FLEX):
        return scaling_torch.made(way, mask, group, args)
    if way == "pass_kv":
        make = sd.Shards.zigzag if args.options.get("causal") else sd.Shards.even
        shards = make(args.length, ranks, 1 if mask is None else mask.block_q)
        if mask is None:
            call = functools.partial(sd.pass_kv, shards=shards, **common)
        else:
            plan = sd.plan_kv(mask, shards, group=group)
            call = functools.partial(sd.pass_kv, mask=plan, **common)
        return Way(lambda x: sd.shard(x, shards, group=group), call)
    common |= {"mask": mask, "slices": slices(way, ranks, args)}
    part = even(rank, ranks)
    if way.startswith("ulysses"):
        function, attention = sd.ulysses, op.function if op.chooses else None
        if op.on_grid:
            attention = sparse_fmha.neighborhood_attention
    else:
        function, attention = sd.all_gather_kv, None
        if way.startswith("zigzag"):
            common["zigzag"] = True
            part = functools.partial(sd.zigzag_shard, group=group)
    call = functools.partial(function, attention=attention, **common)
    moving = functools.partial(function, attention=computes_nothing, **common)
    return Way(part, call, moving)


def computes_nothing(q: Tensor, *args: object, **options: object) -> Tensor:
    """In the place of attention: what is left of a call is communication."""
    return q
