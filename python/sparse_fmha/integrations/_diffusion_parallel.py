"""Ulysses context parallelism of diffusers: tokens of ranks outside of attention, heads inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha.integrations._diffusion_layout import Layout

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# How models cut the tokens of an attention: as one sequence, or those before the grid, and the rest
# of them, each.
SEQUENCE, STREAMS = "sequence", "streams"


def check(config: Any, model: str, layout: Layout, cut: str | None) -> None:
    """Raises NotImplementedError for what is not computed with a `_parallel_config`."""
    own = getattr(config, "context_parallel_config", None)
    if own is None or (getattr(own, "ring_degree", None) or 1) > 1:
        raise NotImplementedError(
            f"context parallelism of {model} is supported by 'sparse_fmha' as Ulysses alone; give "
            "ContextParallelConfig a ulysses_degree and no ring_degree"
        )
    if layout.cached:
        raise NotImplementedError(f"context parallelism of {model} with keys without queries")
    if layout.plain and cut is None:
        raise NotImplementedError(
            f"context parallelism of {model}, which diffusers has no plan for, is not supported"
        )


def attend(
    compute: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layout: Layout,
    cut: str | None,
    config: Any,
) -> Tensor:
    """Attention of q, k, v `[B, tokens of this rank, H, D]` to out like q.

    Args:
        compute: attention of some heads over all tokens.
        mask: of the keys of this rank, or of all in the model's order.
        layout: of all tokens.
        cut: one of the above; not used without plain tokens.
        config: the `_parallel_config` of the processor.
    """
    from sparse_fmha.distributed import ulysses  # only here, as it needs torch.distributed

    own = config.context_parallel_config
    group = own._ulysses_mesh.get_group()
    world = dist.get_world_size(group)
    sizes = _sizes(layout, cut, world)

    def whole(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Tensor:
        q, k, v = (_joined(x, sizes) for x in (q, k, v))
        return _parted(compute(q, k, v, keys), sizes)

    keys = mask
    if mask is not None and mask.shape[-1] != layout.tokens:
        keys = _joined(_gathered(mask, sizes, group), sizes, -1)
    out: Tensor = ulysses(
        q, k, v, whole, group=group, validate=bool(getattr(own, "ulysses_anything", False))
    )
    return out


def _sizes(layout: Layout, cut: str | None, world: int) -> list[list[int]]:
    """Tokens of each rank, in the parts that the model cuts."""
    parts = [layout.tokens]
    if layout.before and cut == STREAMS:
        parts = [layout.before, layout.tokens - layout.before]
    return [[n // world + (rank < n % world) for n in parts] for rank in range(world)]


def _joined(x: Tensor, sizes: list[list[int]], dim: int = 1) -> Tensor:
    """From the tokens of rank after rank to the model's order."""
    if len(sizes[0]) == 1:
        return x
    pieces = x.split([n for own in sizes for n in own], dim)
    return torch.cat([*pieces[::2], *pieces[1::2]], dim)


def _parted(x: Tensor, sizes: list[list[int]]) -> Tensor:
    """The inverse of `_joined`."""
    if len(sizes[0]) == 1:
        return x
    first, rest = (x_.split([own[n] for own in sizes], 1) for n, x_ in enumerate(_halves(x, sizes)))
    return torch.cat([piece for both in zip(first, rest, strict=True) for piece in both], 1)


def _halves(x: Tensor, sizes: list[list[int]]) -> tuple[Tensor, Tensor]:
    before = sum(own[0] for own in sizes)
    return x[:, :before], x[:, before:]


def _gathered(mask: Tensor, sizes: list[list[int]], group: dist.ProcessGroup) -> Tensor:
    """The masks of all ranks, one after the other."""
    lengths = [sum(own) for own in sizes]
    padded = torch.nn.functional.pad(mask.byte(), (0, max(lengths) - mask.shape[-1])).contiguous()
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded, group=group)
    return torch.cat([x[..., :n] for x, n in zip(found, lengths, strict=True)], -1).bool()
