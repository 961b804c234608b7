"""Sequence parallel attention by passing keys on: each rank keeps its queries."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparse_fmha import _checks, skipping
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.attention import _scores
from sparse_fmha.distributed import (
    _additions,
    _agreement,
    _collectives,
    _groups,
    _masks,
    _pass_ops,
    _sharding,
)
from sparse_fmha.distributed._key_plan import KeyPlan, plan_kv
from sparse_fmha.distributed._shards import Shards


@overload
def pass_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: _masks.Mask | KeyPlan | None = None,
    *,
    causal: bool = False,
    shards: Shards | None = None,
    key_shards: Shards | None = None,
    steps: int | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    group: _groups.Group = None,
    return_lse: Literal[False] = False,
    validate: bool = True,
) -> Tensor: ...


@overload
def pass_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: _masks.Mask | KeyPlan | None = None,
    *,
    causal: bool = False,
    shards: Shards | None = None,
    key_shards: Shards | None = None,
    steps: int | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    group: _groups.Group = None,
    return_lse: Literal[True],
    validate: bool = True,
) -> tuple[Tensor, Tensor]: ...


@overload
def pass_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: _masks.Mask | KeyPlan | None = None,
    *,
    causal: bool = False,
    shards: Shards | None = None,
    key_shards: Shards | None = None,
    steps: int | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    group: _groups.Group = None,
    return_lse: bool,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]: ...


def pass_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: _masks.Mask | KeyPlan | None = None,
    *,
    causal: bool = False,
    shards: Shards | None = None,
    key_shards: Shards | None = None,
    steps: int | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    group: _groups.Group = None,
    return_lse: bool = False,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a sequence sharded over ranks; keys arrive in steps while others are used.

    Each rank keeps its queries. It starts with its own keys; meanwhile those of another rank
    arrive, and so on. Results are merged by their log-sum-exp as in ring attention (Liu et al.
    2023, arXiv:2310.01889; pass-KV of Yang et al. 2024, arXiv:2411.01783), but each rank sends its
    keys straight to those that need them, and only the keys that they need: those that `causal` or
    a mask's lists show to any of the rank's queries. The backward pass exchanges the keys again and
    sends their gradients back while others are computed. Any number of heads, ranks and tokens is
    allowed; ranks may have no tokens.

    Args:
        q: `[B, tokens of this rank, Hq, D]`. For dtypes, strides and D see `sparse_fmha.attention`.
        k: `[B, keys of this rank, Hkv, D]`; Hq is a multiple of Hkv.
        v: like k.
        mask: a mask of the whole sequence, the same on every rank. Its lists are cut for each step,
            which waits for the device: for several calls pass `plan_kv(mask, ...)` instead.
        causal: query i sees key j only if `j <= i + (Lkv - Lq)`. A mask has its own flag.
        shards: the tokens of each rank. Default: rank after rank, each as many as it has in q.
        key_shards: likewise for k; default `shards` if Lkv is Lq.
        steps: in how many steps the keys of other ranks arrive, at most and by default world - 1.
            Fewer steps merge less, more hide more; memory is that of the keys of two steps.
        scale: factor of q.k; default `D**-0.5`.
        key_bias: fp32 `[B or 1, Hq or 1, keys of this rank]`, added to the scores as in
            `sparse_fmha.attention`. It travels with the keys, and its gradient with theirs.
        row_threshold: fp32 `[B or 1, Hq or 1, tokens of this rank]`, with a mask and key_bias; see
            `sparse_fmha.block_sparse_attention`.
        sink: fp32 `[Hq]`, whole and equal on every rank, and so is its gradient; see
            `sparse_fmha.attention`.
        skip_threshold: see `sparse_fmha.attention`; forward only. Each step compares with the
            largest scores over its own keys, so fewer tiles are skipped than on one rank.
        group: process group or one-dimensional mesh; default all ranks.
        return_lse: also return the log-sum-exp.
        validate: compare the ranks' shapes first, which waits for the device. Without it, `shards`
            default to as many tokens on each rank, and different shapes are undefined behavior and
            may deadlock.

    Returns:
        `out`, `[B, tokens of this rank, Hq, D]`, contiguous; with `return_lse` also `lse`,
        `[B, tokens of this rank, Hq]` in fp32. Results of one step are those of one call bit by
        bit. Others are merged in fp32 and rounded once. Gradients of keys are added in fp32 over
        a step, rounded, sent, and added in fp32 over the ranks.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a rank is late; the error of a late
            rank names the step.
        ValueError: ranks that do not agree, shards of other lengths or another number of ranks,
            spans that cut blocks of the mask, or arguments that a plan has already.
        TypeError: a DTensor, or a mask, group or tensor of the wrong type.
        NotImplementedError: an input with a forward-mode tangent, a mask instead of a plan inside
            torch.compile, a causal mask where keys have other shards than queries, or a gradient
            where tiles may be skipped.
    """
    group, rank, world = _groups.resolve(group)
    _checks.check_flag("causal", causal)
    if causal and mask is not None:
        raise ValueError("causal must not be given with a mask, which has its own causal")
    if row_threshold is not None and mask is None:
        raise ValueError("mask must be given with row_threshold, got only the latter")
    if row_threshold is not None and key_bias is None:
        raise ValueError("key_bias must be given with row_threshold, got only the latter")
    if steps is not None:
        _checks.check_int("steps", steps, 1)
    scale = _checks.finite("scale", scale)
    plan, lists = (mask, None) if isinstance(mask, KeyPlan) else (None, mask)
    if plan is not None:
        if any(x is not None for x in (shards, key_shards, steps)):
            raise ValueError("shards, key_shards and steps must not be given with a plan")
        shards, key_shards = plan.shards, plan.key_shards
    elif lists is not None and not isinstance(lists, _masks.MASKS):
        raise TypeError(
            f"mask must be a BlockMask, a StripeMask or a KeyPlan, got {type(mask).__name__}"
        )
    elif lists is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "mask must be a KeyPlan inside torch.compile; call plan_kv(mask) outside"
        )
    for given in (shards, key_shards):
        if given is not None:
            _sharding.check_world(given, world)
    q, k, v = cast_where_enabled(q, k, v)
    _groups.check_local(q=q, k=k, v=v)
    added = {"key_bias": key_bias, "row_threshold": row_threshold, "sink": sink}
    if validate:
        kind = _masks.kind(lists) if plan is None else plan.kind
        flags = {"causal": int(causal), "kind of mask": kind, "steps": steps or 0}
        flags |= _additions.sizes(added)
        lengths = _agreement.lengths(q, k, flags, (shards, key_shards), group, world)
        shards = shards or Shards.of_lengths(tokens for tokens, _ in lengths)
        if key_shards is None:
            keys = [keys for _, keys in lengths]
            key_shards = shards if list(shards.lengths) == keys else Shards.of_lengths(keys)
        _agreement.check_lengths(shards, key_shards, lengths)
    else:
        for name, x, given in (("q", q, shards), ("k", k, key_shards)):
            _agreement.check_own(name, x, given, rank)
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    _additions.check(added, q, k)
    if plan is not None and plan.heads not in (1, q.shape[2]):
        raise ValueError(
            f"mask must be a plan of lists for 1 head or the {q.shape[2]} of this call, got "
            f"{plan.heads}"
        )
    if lists is not None:
        plan = plan_kv(lists, shards, key_shards=key_shards, steps=steps, group=group)
    out, lse = _pass_ops.call(
        q, k, v, key_bias, row_threshold, skipping.threshold_of(skip_threshold, q, counted=False),
        plan, shards, key_shards, steps, causal, scale, group,
    )  # fmt: skip
    if sink is not None:
        whole = _collectives.shared(sink, group, "pass_kv: sink")
        out, lse = _scores.add_sink(out, lse, whole)
    return (out, lse) if return_lse else out
