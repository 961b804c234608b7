"""Sequence parallel attention over two levels of ranks: heads within a host, keys across hosts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparse_fmha.distributed import _groups, _head_order, _masks
from sparse_fmha.distributed._key_plan import KeyPlan
from sparse_fmha.distributed._pass_kv import pass_kv
from sparse_fmha.distributed._shards import Shards
from sparse_fmha.distributed._ulysses import ulysses


def two_levels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: _masks.Mask | KeyPlan | None = None,
    *,
    mesh: DeviceMesh,
    causal: bool = False,
    shards: Shards | None = None,
    steps: int | None = None,
    slices: int = 1,
    head_order: Sequence[int] | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ulysses` among the ranks of a host, with `pass_kv` across hosts in the place of attention.

    The ranks of a host exchange heads for tokens over their fast links, so that each has the host's
    tokens of its heads. Only keys of these heads travel between hosts, while others are used. This
    is the two-level scheme of USP (Fang and Zhao 2024, arXiv:2405.07719) and LoongTrain (Gu et al.
    2024, arXiv:2406.18485).

    Args:
        q, k, v: `[B, tokens of this rank, heads, D]`. The ranks of a host have its tokens one after
            the other, any number each. Heads must fit `ulysses` on the ranks of a host.
        mask: a mask of the whole sequence, the same on every rank, with lists for 1 head, all Hq
            heads, or those of the rank. Its lists are cut at each call, which waits for the device.
            For several calls pass `plan_kv(mask, shards, group=mesh.get_group(0))`, of a mask with
            lists for 1 head or those of the rank, and no shards or steps.
        mesh: two dimensions: hosts, and the ranks of a host, such as `mesh["hosts", "ranks"]`.
        shards: the tokens of each host; default even. `shards.split(n)` are the tokens of all
            ranks, for `shard`.
        slices: see `ulysses`; 1 with a plan of lists for several heads.
        head_order: see `ulysses`, for the ranks of a host.
        causal, steps, scale, key_bias, row_threshold, sink, skip_threshold, return_lse, validate:
            see `pass_kv`.

    Returns:
        As `pass_kv`.

    Raises:
        ValueError: a mesh of another number of dimensions; else see `ulysses` and `pass_kv`.
        TypeError, RuntimeError, NotImplementedError: see `ulysses` and `pass_kv`.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 2:
        raise ValueError(f"mesh must have two dimensions, hosts and ranks, got {mesh.ndim}")
    across, within = (mesh.get_group(dim) for dim in range(2))
    _, rank, world = _groups.resolve(within)
    options: dict[str, Any] = {
        "causal": causal, "shards": shards, "steps": steps, "scale": scale, "validate": validate,
        "skip_threshold": skip_threshold, "group": across,
    }  # fmt: skip
    attention: Callable[..., Any] = functools.partial(pass_kv, mask=mask, **options)
    if isinstance(mask, _masks.MASKS):
        order = _head_order.checked(head_order, q.shape[2], k.shape[2], world)
        lists = _masks.heads(mask, order.of_rank(rank, world)[0], q.shape[2])
        numbers = itertools.count()  # of the slices, which are computed one after the other

        def attention_of_lists(q: Tensor, k: Tensor, v: Tensor, **added: Any) -> Any:
            heads = q.shape[2]
            first = next(numbers) * heads
            some = _masks.some_heads(lists, slice(first, first + heads), slices * heads)
            return pass_kv(q, k, v, some, **options, **added)

        attention = attention_of_lists
    return ulysses(
        q, k, v, attention, group=within, slices=slices, head_order=head_order,
        return_lse=return_lse, validate=validate, key_bias=key_bias, row_threshold=row_threshold,
        sink=sink,
    )  # fmt: skip
