"""The ways of benchmarks.studies.scaling to run an op on several ranks."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_fmha
import sparse_fmha.distributed as sd
from benchmarks.studies.scaling_ops import Op
from sparse_fmha import BlockMask

SLICES = " in slices"


@dataclass(frozen=True)
class Way:
    """A function of this rank's parts.

    Attributes:
        part: takes this rank's part of a whole tensor.
        call: the function of the parts of q, k and v; within `context`.
        moving: the same with nothing computed, None where that cannot be called.
    """

    part: Callable[[Tensor], Tensor]
    call: Callable[..., Tensor]
    moving: Callable[..., Tensor] | None = None
    context: Callable[[], object] = nullcontext


def divides(ranks: int, args: argparse.Namespace) -> bool:
    """Whether ulysses takes the numbers of heads."""
    return args.heads % ranks == 0 and (args.heads_kv % ranks == 0 or ranks % args.heads_kv == 0)


def possible(op: Op, ranks: int, args: argparse.Namespace) -> list[str]:
    """Those that take the numbers of heads, on this device."""
    return [
        way for way in op.ways
        if (divides(ranks, args) or not way.startswith("ulysses"))
        and (way != "torch" or not args.tiny)
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
    if way == "torch":
        return _torch(group, bool(args.options.get("causal")))
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
    part = _even(rank, ranks)
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


def _even(rank: int, ranks: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.chunk(ranks, 1)[rank].contiguous()


def _torch(group: dist.ProcessGroup, causal: bool) -> Way:
    """Context parallelism of torch with cuDNN, with `causal` in its order of heads and tails.

    That is our zig-zag order. It does not take fewer key heads than query heads, so k and v are
    repeated, which is timed too.
    """
    from torch.distributed.tensor.experimental import context_parallel

    mesh = DeviceMesh.from_group(group, "cuda")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    @contextmanager
    def context() -> Iterator[None]:
        # It replaces the function in `functional`, and shards tensors: here one that is not used.
        # Only `causal` can be balanced, which it does if 2 * ranks divide the tokens.
        buffer = torch.zeros(mesh.size() * (2 if causal else 1), device=mesh.device_type)
        with (
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]),
        ):
            yield

    part = _even(dist.get_rank(group), mesh.size())
    if causal:
        part = functools.partial(sd.zigzag_shard, group=group)
    return Way(part, call, context=context)
