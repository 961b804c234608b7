"""What `explain` finds in a call of each function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_fmha import _checks, skipping
from sparse_fmha.attention import (
    _scores,
    attention,
    block_sparse_attention,
    neighborhood_attention,
    stripe_attention,
)
from sparse_fmha.cost import decode_reads, model
from sparse_fmha.cost.block_model import block_sparse_cost
from sparse_fmha.cost.simulation import simulate, tile_simulator
from sparse_fmha.cost.tile_problem import check_problem
from sparse_fmha.decode import arguments, decode_attention
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.operands import check_block_mask, check_stripe_mask
from sparse_fmha.masks.stripe_mask import StripeMask

DEVICES = ("cpu", "cuda", "meta")
NARROW_VALUES = 192, 128  # head dims of q and v of rows of csrc/kernels/sm90_forward.def
THRESHOLD_DIM = 128  # kLargestWithThresholds of planning/gathered_keys.h
Given = Mapping[str, Any]  # arguments of a call, by name


@dataclass(frozen=True)
class Times:
    predicted_us: float | None
    dense_us: float | None
    density: float | None = None
    reachable_density: float | None = None
    break_even: float | None = None
    read_bytes: int | None = None
    parts: int | None = None
    tile_q: int = 0  # of the decode kernel that a call takes, where several differ
    tiles: tuple[model.TileTime, ...] = ()  # of the rows that a call chooses among


Described = tuple[str, Times | None, tuple[str, ...]]  # mechanism, times, notes


def _dense(given: Given, arch: str) -> Described:
    q, k, v = _checked(given, (1,))
    causal = given["causal"]
    _checks.check_flag("causal", causal)
    mechanism = "causal" if causal else "dense"
    if arch != model.ARCH or _has_narrow_values(q, v):
        return mechanism, None, ()
    us = model.dense_us(*_problem(q, k, v), causal)
    on = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    multiprocessors = on.multi_processor_count if on else model.MULTIPROCESSORS
    tiles = model.tile_times(*_problem(q, k, v), causal, multiprocessors)
    return mechanism, Times(us, us, tiles=tiles), ()


def _neighborhood(given: Given, arch: str) -> Described:
    q, k, v = _checked(given, (1, 2, 3))
    _checks.check_grid(q, k)
    _checks.check_extra(given["extra_k"], given["extra_v"], q, k, v, DEVICES)
    extra = 0 if given["extra_k"] is None else given["extra_k"].shape[1]
    batch, heads, q_len, kv_len, head_dim = _problem(q, k, v)
    simulation = simulate(
        tuple(q.shape[1:-2]),
        given["window"],
        stride=given["stride"],
        dilation=given["dilation"],
        causal=given["causal"],
        heads=heads,
        batch=batch,
        head_dim=head_dim,
        extra=extra,
    )
    dense = model.dense_us(batch, heads, q_len, kv_len + extra, head_dim, False)
    times = Times(simulation.predicted_ms * 1e3, dense)
    notes = (f"tiles of {simulation.tile_q} queries and {simulation.tile_k} keys",)
    return "neighborhood", _on(arch, times), notes if arch == model.ARCH else ()


def why_two_kernels(function: Callable[..., object], given: Given, skips: bool) -> str | None:
    """Why the gradients take two kernels where there is one of all; None: they take the one."""
    if function is neighborhood_attention and skips:
        return None  # blocks of kept tiles are small, but listed together
    if function is block_sparse_attention:
        return tile_simulator().why_two_kernels_for_blocks(given["mask"].block_kv)
    if function is not neighborhood_attention:
        return None
    extra = 0 if given["extra_k"] is None else given["extra_k"].shape[1]
    axes = (given[name] for name in ("window", "stride", "dilation", "causal"))
    problem = check_problem(tuple(given["q"].shape[1:-2]), *axes)
    return tile_simulator().why_two_kernels(problem.walk, extra)


def why_not_gathered(
    function: Callable[..., object], given: Given, arch: str, skips: bool
) -> str | None:
    """Why the gradients of a call copy no keys; None: they do (planning/gathered_keys.h)."""
    if function is not stripe_attention or arch != model.ARCH:
        return "keys are not listed one by one"
    largest = max(given["q"].shape[-1], given["v"].shape[-1])
    if given["row_threshold"] is not None and largest > THRESHOLD_DIM:
        return f"block lists take no row_threshold above head dim {THRESHOLD_DIM}"
    mask: StripeMask = given["mask"]
    runs = 0 if mask.range_starts is None else mask.range_starts.shape[-1] * mask.range_size
    rows = 64 if skips else mask.block_q  # each 64 rows list what they kept
    listed = min(mask.columns.shape[-1] + runs, mask.kv_len)
    return tile_simulator().why_not_gathered(rows, listed, mask.kv_len)


def launches(function: Callable[..., object], given: Given) -> int:
    """Launches of kernels on Hopper whose boxes have element strides (planning/interleaved.h)."""
    if function is not neighborhood_attention:
        return 1
    axes = (given[name] for name in ("window", "stride", "dilation", "causal"))
    grid, _, _, dilation, _ = check_problem(tuple(given["q"].shape[1:-2]), *axes).walk
    return tile_simulator().launches(grid, dilation)


def _block_sparse(given: Given, arch: str) -> Described:
    q, k, v = _checked(given, (1,))
    mask: BlockMask = given["mask"]
    check_block_mask(mask, q, k, on_device=False)
    if arch != model.ARCH or _has_narrow_values(q, v):
        return "block_sparse", None, ()
    batch, heads, q_len, kv_len, head_dim = _problem(q, k, v)
    dense = model.dense_us(batch, heads, q_len, kv_len, head_dim, mask.causal)
    cost = block_sparse_cost(mask, batch, heads, head_dim, dense)
    reachable = mask.reachable_block_density
    times = Times(cost.us, dense, cost.density, reachable, cost.break_even_density)
    return "block_sparse", times, ()


def _stripe(given: Given, arch: str) -> Described:
    q, k, _ = _checked(given, (1,))
    check_stripe_mask(given["mask"], q, k, on_device=False)
    return "stripe", None, ()


def _decode(given: Given, arch: str) -> Described:
    keys = decode_reads.keys_of(given)
    q, k, v, seq_lens = (given[name] for name in ("q", "k_cache", "v_cache", "seq_lens"))
    arguments.check(q, k, v, seq_lens, keys, given["split_tokens"], given["out"], DEVICES)
    _scores.checked_softcap(given["softcap"])
    skipping.check(given["skip_threshold"], given["q"])
    reads = decode_reads.reads_of(given, keys, arch == "cpu")
    us, all_us = reads.least_us if arch == model.ARCH else (None, None)
    # How many workers other GPUs have is not known here.
    is_known = arch in ("cpu", model.ARCH) or given["split_tokens"] is not None
    parts = reads.parts if is_known else None
    blocks = decode_reads.few_rows_blocks(given, keys) if arch == model.ARCH else 0
    if blocks:
        parts = q.shape[0] * k.shape[2] * blocks
    notes = ("lengths and lists count as full",) if reads.assumed else ()
    return (
        "decode",
        Times(us, all_us, read_bytes=reads.bytes, parts=parts, tile_q=16 if blocks else 64),
        notes,
    )


def _on(arch: str, times: Times) -> Times | None:
    return times if arch == model.ARCH else None


def _checked(given: Given, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v, checked as in the functions; device meta counts as a GPU."""
    q, k, v = (given[name] for name in "qkv")
    _checks.check_qkv(q, k, v, axes=axes, devices=DEVICES)
    skipping.check(given["skip_threshold"], q)
    _checks.finite("scale", given["scale"])
    _scores.check(q, k, given["softcap"], given["key_bias"], given.get("row_threshold"))
    if given["sink"] is not None:
        _scores.check_sink(given["sink"], q)
    return q, k, v


def _has_narrow_values(q: Tensor, v: Tensor) -> bool:
    """Whether dense attention and block lists have a row of their own, which has no model yet."""
    dim, value_dim = NARROW_VALUES
    return value_dim < q.shape[-1] <= dim and v.shape[-1] <= value_dim


def _problem(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """Returns batch, heads, query tokens, key tokens and the larger head dim."""
    q_len, kv_len = (x.shape[1:-2].numel() for x in (q, k))
    return q.shape[0], q.shape[-2], q_len, kv_len, max(q.shape[-1], v.shape[-1])


DESCRIBED: dict[Callable[..., object], Callable[[Given, str], Described]] = {
    attention: _dense,
    neighborhood_attention: _neighborhood,
    block_sparse_attention: _block_sparse,
    stripe_attention: _stripe,
    decode_attention: _decode,
}
