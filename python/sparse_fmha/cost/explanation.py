"""Which kernel a call selects, why not the others, and the predicted time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_fmha import _build, _checks, skipping
from sparse_fmha.attention import (
    _scores,
    attention,
    block_sparse_attention,
    neighborhood_attention,
    stripe_attention,
)
from sparse_fmha.cost import model
from sparse_fmha.cost.block_model import block_sparse_cost
from sparse_fmha.cost.simulation import simulate
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.operands import check_block_mask, check_stripe_mask

DEVICES = ("cpu", "cuda", "meta")
Given = Mapping[str, Any]  # arguments of a call, by name


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`; prints at most five lines, and one more where gradients are needed.

    `why_not` lists the other kernels.
    """

    mechanism: str  # as in `sparse_fmha.kernels()`
    arch: str  # "cpu", or a GPU architecture such as "sm90"
    kernel: str | None  # the kernel that the call selects; None: the call raises
    why: str  # the reason for the selection
    rejected: dict[str, str]  # other kernels of the mechanism and architecture: reason
    predicted_ms: float | None  # on an H100; None on the CPU and for stripes, without a model
    dense_ms: float | None  # `attention` on the same tokens
    density: float | None  # share of blocks listed, for block lists
    reachable_density: float | None  # the same, of the blocks that causality leaves
    break_even_density: float | None  # where block lists take as long as dense; inf: nowhere
    notes: tuple[str, ...]
    dq_kernel: str | None  # what finds the gradient of q; None: asking for it raises
    dkv_kernel: str | None  # the same for k and v
    needs_gradients: bool  # q, k or v require a gradient

    @property
    def speedup(self) -> float | None:
        """Predicted speedup over dense attention."""
        if self.predicted_ms is None or self.dense_ms is None:
            return None
        return self.dense_ms / self.predicted_ms

    def __str__(self) -> str:
        lines = [f"{self.mechanism} on {self.arch}: {self.kernel or 'no kernel'}", f"  {self.why}"]
        if self.predicted_ms is not None:
            lines.append(
                f"  predicted on an H100: {self.predicted_ms:.3f} ms, dense attention "
                f"{self.dense_ms:.3f} ms: {self.speedup:.2f}x"
            )
        if self.break_even_density is not None:
            until = (
                "faster than dense attention at any density"
                if self.break_even_density == math.inf
                else f"as long as dense attention at {self.break_even_density:.1%}"
            )
            listed = f"{self.density:.1%} of blocks are listed"
            if self.density != self.reachable_density:
                listed += f" ({self.reachable_density:.1%} of those that causality leaves)"
            lines.append(f"  {listed}; {until}")
        if self.needs_gradients:
            lines.append(f"  {self.backward}")
        if self.notes:
            lines.append(f"  note: {'; '.join(self.notes)}")
        return "\n".join(lines)

    @property
    def backward(self) -> str:
        """Which kernels compute the gradients, and in which form."""
        passes = {"dq": self.dq_kernel, "dk and dv": self.dkv_kernel}
        missing = " or ".join(name for name, kernel in passes.items() if kernel is None)
        if missing:
            return f"backward: no kernel for {missing}, so asking for it raises"
        found = "; ".join(f"{name} by {kernel}" for name, kernel in passes.items())
        return f"backward: {found}; no atomics, so results repeat bitwise"

    def why_not(self) -> str:
        """Lists the other kernels of the mechanism and architecture, one per line, with reasons."""
        rejected = (f"  not {name}: {reason}" for name, reason in self.rejected.items())
        return "\n".join(rejected) or "  there are no other rows"


def explain(
    function: Callable[..., object], /, *args: object, arch: str | None = None, **kwargs: object
) -> Explanation:
    """Explains which kernel a call would select and why, and predicts its time.

    Times are from a cost model of one H100 SXM (docs/simulator.md gives its accuracy). Nothing is
    run, so tensors on device "meta" work. Block lists are read, which waits for their device.

    Args:
        function: `sparse_fmha.attention`, `neighborhood_attention`, `block_sparse_attention` or
            `stripe_attention`, which has no cost model yet.
        args, kwargs: arguments of the function, checked as in the function.
        arch: "cpu", or a GPU architecture such as "sm90"; default: that of q's device.

    Raises:
        ValueError: function is not one of these, arch is unknown, or arch is missing and q is on
            another device; also as in the function.
        TypeError: as in the function.
        ImportError: the extension `_C` is not available for this Python.
    """
    described = {
        attention: _dense,
        neighborhood_attention: _neighborhood,
        block_sparse_attention: _block_sparse,
        stripe_attention: _stripe,
    }
    if function not in described:
        names = _checks.one_of(f.__name__ for f in described)
        raise ValueError(f"function must be {names}, got {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    q = given["q"]
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    arch = arch or _arch_of(q.device)
    from sparse_fmha._extension import _C

    archs = ("cpu", *_C.gpu_archs())
    if arch not in archs:
        raise ValueError(f"arch must be {' or '.join(archs)} for q on {q.device}, got {arch}")
    mechanism, times, notes = described[function](given, arch)
    skips = isinstance(given["skip_threshold"], Tensor) or given["skip_threshold"] > 0
    skips = skips or given["return_stats"]
    if skips and times is not None:
        notes = (*notes, "what skipping key tiles saves is not in the time")
    operands = (x for x in given.values() if isinstance(x, Tensor))
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    biased = given["key_bias"] is not None
    return _choose(mechanism, arch, q, skips, biased, times, notes, needs_gradients)


def _arch_of(device: torch.device) -> str | None:
    if device.type == "cuda":
        from sparse_fmha._extension import _C

        return _C.arch_of_capability(*torch.cuda.get_device_capability(device))
    return "cpu" if device.type == "cpu" else None


@dataclass(frozen=True)
class _Times:
    predicted_us: float
    dense_us: float
    density: float | None = None
    reachable_density: float | None = None
    break_even: float | None = None


def _dense(given: Given, arch: str) -> tuple[str, _Times | None, tuple[str, ...]]:
    q, k = _checked(given, (1,))
    causal = given["causal"]
    _checks.check_flag("causal", causal)
    us = model.dense_us(*_problem(q, k), causal) if arch == model.ARCH else 0.0
    return "causal" if causal else "dense", _on(arch, _Times(us, us)), ()


def _neighborhood(given: Given, arch: str) -> tuple[str, _Times | None, tuple[str, ...]]:
    q, k = _checked(given, (1, 2, 3))
    _checks.check_grid(q, k)
    _checks.check_extra(given["extra_k"], given["extra_v"], q, k, DEVICES)
    extra = 0 if given["extra_k"] is None else given["extra_k"].shape[1]
    simulation = simulate(
        tuple(q.shape[1:-2]),
        given["window"],
        stride=given["stride"],
        dilation=given["dilation"],
        causal=given["causal"],
        heads=q.shape[-2],
        batch=q.shape[0],
        head_dim=q.shape[-1],
        extra=extra,
    )
    batch, heads, q_len, kv_len, head_dim = _problem(q, k)
    dense = model.dense_us(batch, heads, q_len, kv_len + extra, head_dim, False)
    times = _Times(simulation.predicted_ms * 1e3, dense)
    notes = (f"tiles of {simulation.tile_q} queries and {simulation.tile_k} keys",)
    return "neighborhood", _on(arch, times), notes if arch == model.ARCH else ()


def _block_sparse(given: Given, arch: str) -> tuple[str, _Times | None, tuple[str, ...]]:
    q, k = _checked(given, (1,))
    mask: BlockMask = given["mask"]
    check_block_mask(mask, q, k, on_device=False)
    if arch != model.ARCH:
        return "block_sparse", None, ()
    batch, heads, q_len, kv_len, head_dim = _problem(q, k)
    dense = model.dense_us(batch, heads, q_len, kv_len, head_dim, mask.causal)
    cost = block_sparse_cost(mask, batch, heads, head_dim, dense)
    reachable = mask.reachable_block_density
    times = _Times(cost.us, dense, cost.density, reachable, cost.break_even_density)
    return "block_sparse", times, ()


def _stripe(given: Given, arch: str) -> tuple[str, _Times | None, tuple[str, ...]]:
    q, k = _checked(given, (1,))
    check_stripe_mask(given["mask"], q, k, on_device=False)
    return "stripe", None, ()


def _on(arch: str, times: _Times) -> _Times | None:
    return times if arch == model.ARCH else None


def _checked(given: Given, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns q and k, checked as in the functions; device meta counts as a GPU."""
    q, k, v = (given[name] for name in "qkv")
    _checks.check_qkv(q, k, v, axes=axes, devices=DEVICES)
    skipping.check(given["skip_threshold"], q)
    _checks.finite("scale", given["scale"])
    _scores.check(q, k, given["key_bias"], given.get("row_threshold"))
    if given["sink"] is not None:
        _scores.check_sink(given["sink"], q)
    return q, k


def _problem(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """Returns batch, heads, query tokens, key tokens and head dim."""
    q_len, kv_len = (x.shape[1:-2].numel() for x in (q, k))
    return q.shape[0], q.shape[-2], q_len, kv_len, q.shape[-1]


def _choose(
    mechanism: str,
    arch: str,
    q: Tensor,
    skips: bool,
    biased: bool,
    times: _Times | None,
    notes: tuple[str, ...],
    needs_gradients: bool,
) -> Explanation:
    dtype, head_dim = str(q.dtype).removeprefix("torch."), q.shape[-1]

    def rows_of(direction: str) -> list[_build.KernelRow]:
        wanted = (arch, direction, mechanism, skips)
        return [
            row
            for row in _build.kernels()
            if (row["arch"], row["pass"], row["mechanism"], row["skips"]) == wanted
        ]

    def smallest(rows: list[_build.KernelRow]) -> _build.KernelRow | None:
        fits = [
            row
            for row in rows
            if row["dtype"] == dtype and row["head_dim"] >= head_dim and row["key_bias"] >= biased
        ]
        return min(fits, key=lambda row: row["head_dim"], default=None)

    def name_of(row: _build.KernelRow | None) -> str | None:
        return None if row is None else row["name"]

    rows = rows_of("forward")
    best = smallest(rows)
    rejected = {}
    for row in rows:
        if row["dtype"] != dtype:
            reason = f"is for {row['dtype']}, q is {dtype}"
        elif row["head_dim"] < head_dim:
            reason = f"takes head dims up to {row['head_dim']}, q has {head_dim}"
        elif biased and not row["key_bias"]:
            reason = "takes no key_bias"
        else:
            reason = f"takes head dims up to {row['head_dim']}, a smaller row fits"
        if row is not best:
            rejected[row["name"]] = reason
    if best is not None:
        why = f"the smallest row for {dtype} whose head dim is at least {head_dim}"
    elif rows:
        bias = " and key_bias" if biased else ""
        why = f"no row is for {dtype} with head dim {head_dim}{bias}: the call raises"
    else:
        why = f"this build has no {mechanism} kernel for {arch}: the call raises"
    return Explanation(
        mechanism=mechanism,
        arch=arch,
        kernel=name_of(best),
        why=why,
        rejected=rejected,
        predicted_ms=None if times is None else times.predicted_us / 1e3,
        dense_ms=None if times is None else times.dense_us / 1e3,
        density=None if times is None else times.density,
        reachable_density=None if times is None else times.reachable_density,
        break_even_density=None if times is None else times.break_even,
        notes=notes,
        dq_kernel=name_of(smallest(rows_of("backward_dq"))),
        dkv_kernel=name_of(smallest(rows_of("backward_dkv"))),
        needs_gradients=needs_gradients,
    )
