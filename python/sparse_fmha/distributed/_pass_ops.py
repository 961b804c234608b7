"""The ops of `pass_kv`, forward and backward: torch.compile keeps each as one node of a graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha.distributed import _groups, _key_plan, _steps
from sparse_fmha.distributed._pass import Pass
from sparse_fmha.distributed._shards import Shards

# own is [tokens, B, 2, Hkv, D]; shards are `encoded`, none for as many tokens on each rank.
WAY = (
    "str plan, SymInt[] shards, SymInt[] key_shards, int steps, bool causal, float? scale, "
    "str group"
)
FORWARD = (
    "pass_kv_fwd(Tensor q, Tensor own, Tensor? key_bias, Tensor? row_threshold, "
    f"Tensor? skip_threshold, {WAY}) -> (Tensor, Tensor)"
)
BACKWARD = (
    "pass_kv_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor out, Tensor lse, Tensor own, "
    f"Tensor? key_bias, Tensor? row_threshold, {WAY}, bool need_dq, bool need_dkv, "
    "bool need_dbias) -> (Tensor, Tensor, Tensor)"
)
NAMES = ("q", "own", "key_bias", "row_threshold", "skip_threshold")

_library = torch.library.Library("sparse_fmha", "FRAGMENT")
_registered = False


def encoded(shards: Shards | None) -> list[int]:
    """Shards as the ops take them: for each rank its number of spans and their edges."""
    found: list[int] = []
    for spans in () if shards is None else shards.spans:
        found.append(len(spans))
        for start, stop in spans:
            found += [start, stop]
    return found


def register() -> None:
    """Defines the ops, once. Importing `sparse_fmha.distributed` calls this."""
    global _registered
    if _registered:
        return
    for schema, run, fake in ((FORWARD, _forward, _like_q), (BACKWARD, _backward, _like_inputs)):
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparse_fmha::{name}", fake, lib=_library)
    ops = torch.ops.sparse_fmha
    derivatives.register(_library, ops.pass_kv_fwd.default, _gradients, _setup_context)
    derivatives.register(_library, ops.pass_kv_bwd.default)
    _registered = True


@functools.lru_cache(maxsize=64)
def _decoded(numbers: tuple[int, ...]) -> Shards:
    spans, place = [], 0
    while place < len(numbers):
        first, place = place + 1, place + 1 + 2 * numbers[place]
        edges = numbers[first:place]
        spans.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
    return Shards(tuple(spans))


def _way(
    tokens: int, keys: int, plan: str, shards: Sequence[int], key_shards: Sequence[int],
    steps: int, causal: bool, scale: float | None, group: str,
) -> Pass:  # fmt: skip
    ranks = _groups.of_name(group)
    rank, world = dist.get_rank(ranks), dist.get_world_size(ranks)
    if plan:
        return Pass(_key_plan.named(plan).steps, ranks, scale)
    queries = _decoded(tuple(shards)) if shards else Shards.of_lengths([tokens] * world)
    if key_shards:
        of_keys = _decoded(tuple(key_shards))
    elif queries.lengths[rank] == keys:
        of_keys = queries
    else:
        of_keys = Shards.of_lengths([keys] * world)
    return Pass(_steps.dense(queries, of_keys, rank, causal, steps or None), ranks, scale)


def _moved(own: Tensor, key_bias: Tensor | None) -> list[Tensor]:
    found = [own.contiguous()]
    return found if key_bias is None else [*found, key_bias.movedim(2, 0).contiguous()]


def _forward(
    q: Tensor, own: Tensor, key_bias: Tensor | None, row_threshold: Tensor | None,
    skip_threshold: Tensor | None, *way: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = _way(q.shape[1], len(own), *way)
    return found.forward(q, _moved(own, key_bias), row_threshold, skip_threshold)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, out: Tensor, lse: Tensor, own: Tensor,
    key_bias: Tensor | None, row_threshold: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *way, need_dq, need_dkv, need_dbias = rest
    needs = need_dq, need_dkv, need_dbias
    found = _way(q.shape[1], len(own), *way)
    moved = _moved(own, key_bias)
    dq, totals = found.backward((dout, dlse, q, out, lse), row_threshold, moved, needs)
    none = q.new_empty(0)
    return (
        dq.to(q.dtype) if need_dq else none,
        totals[0].to(own.dtype) if need_dkv else none.clone(),
        totals[1].movedim(0, 2).contiguous() if need_dbias else none.clone(),
    )


def _like_q(q: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _like_inputs(
    dout: Tensor, dlse: object, q: Tensor, out: Tensor, lse: Tensor, own: Tensor,
    key_bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = zip((q, own, key_bias), rest[-3:], strict=True)
    return tuple(
        x.new_empty(x.shape) if needed and x is not None else q.new_empty(0) for x, needed in inputs
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(NAMES)], *output)
    ctx.way = inputs[len(NAMES) :]
    ctx.plan = _key_plan.named(ctx.way[0]) if ctx.way[0] else None  # keeps it alive


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    q, own, key_bias, row_threshold, skip_threshold, out, lse = ctx.saved_tensors
    others = (None,) * (len(NAMES) - 3 + len(ctx.way))
    if skip_threshold is not None:
        raise NotImplementedError(
            "pass_kv has no backward pass yet where it may skip tiles; call it without "
            "skip_threshold, or under torch.no_grad()"
        )
    if dout is None and dlse is None:
        return (None, None, None, *others)
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    needs = [bool(x) for x in ctx.needs_input_grad[:3]]
    found = torch.ops.sparse_fmha.pass_kv_bwd(
        dout, dlse, q, out, lse, own, key_bias, row_threshold, *ctx.way, *needs
    )
    return (*(x if need else None for x, need in zip(found, needs, strict=True)), *others)


def call(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, row_threshold: Tensor | None,
    skip_threshold: Tensor | None, plan: _key_plan.KeyPlan | None, shards: Shards | None,
    key_shards: Shards | None, steps: int | None, causal: bool, scale: float | None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of this rank's queries; without shards each rank has as many tokens."""
    # A message is some of the first dimension.
    own = torch.stack([k.movedim(1, 0), v.movedim(1, 0)], 2)
    where = ("", encoded(shards), encoded(key_shards)) if plan is None else (plan.name, [], [])
    return torch.ops.sparse_fmha.pass_kv_fwd(  # type: ignore[no-any-return]
        q, own, key_bias, row_threshold, skip_threshold, *where, steps or 0, causal, scale,
        _groups.name_of(group),
    )  # fmt: skip
