"""Sequence parallel attention by passing keys on: each rank keeps its queries."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.distributed import _agreement, _groups, _masks, _sharding, _steps
from sparse_fmha.distributed._key_plan import KeyPlan, plan_kv
from sparse_fmha.distributed._pass import Pass, PassKV
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
        NotImplementedError: an input with a forward-mode tangent, torch.compile, or a causal mask
            where keys have other shards than queries.
    """
    group, rank, world = _groups.resolve(group)
    if torch.compiler.is_compiling():
        raise NotImplementedError("pass_kv is not supported inside torch.compile")
    _checks.check_flag("causal", causal)
    if causal and mask is not None:
        raise ValueError("causal must not be given with a mask, which has its own causal")
    if steps is not None:
        _checks.check_int("steps", steps, 1)
    if isinstance(mask, KeyPlan):
        if any(x is not None for x in (shards, key_shards, steps)):
            raise ValueError("shards, key_shards and steps must not be given with a plan")
        shards, key_shards = mask.shards, mask.key_shards
    elif mask is not None and not isinstance(mask, _masks.MASKS):
        raise TypeError(
            f"mask must be a BlockMask, a StripeMask or a KeyPlan, got {type(mask).__name__}"
        )
    for given in (shards, key_shards):
        if given is not None:
            _sharding.check_world(given, world)
    q, k, v = cast_where_enabled(q, k, v)
    _groups.check_local(q=q, k=k, v=v)
    lengths = [(q.shape[1], k.shape[1])] * world
    if validate:
        kind = mask.kind if isinstance(mask, KeyPlan) else _masks.kind(mask)
        lengths = _agreement.lengths(
            q, k, {"causal": int(causal), "kind of mask": kind, "steps": steps or 0},
            (shards, key_shards), group, world,
        )  # fmt: skip
    _checks.check_qkv(q, k, v, axes=(1,))
    shards = shards or Shards.of_lengths(tokens for tokens, _ in lengths)
    if key_shards is None:
        keys = [keys for _, keys in lengths]
        same = list(shards.lengths) == keys
        key_shards = shards if same else Shards.of_lengths(keys)
    _agreement.check_lengths(shards, key_shards, lengths)
    if mask is None:
        planned = _steps.dense(shards, key_shards, rank, causal, steps)
    elif isinstance(mask, KeyPlan):
        planned = mask.steps
    else:
        planned = plan_kv(mask, shards, key_shards=key_shards, steps=steps, group=group).steps
    out, lse = PassKV.apply(q, k, v, Pass(planned, group, scale))  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out
