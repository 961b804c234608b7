"""Which kernel a call selects, why not the others, and the predicted time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_fmha import _build, _checks
from sparse_fmha.cost import calls
from sparse_fmha.cost.calls import Times
from sparse_fmha.cost.model import TileTime

Dims = tuple[int, int]  # head dims of q and v


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`; prints at most five lines, and one more where gradients are needed.

    `why_not` lists the other kernels.
    """

    mechanism: str  # as in `sparse_fmha.kernels()`; "decode" for the pass of that name
    arch: str  # "cpu", or a GPU architecture such as "sm90"
    kernel: str | None  # the kernel that the call selects; None: the call raises
    why: str  # the reason for the selection
    rejected: dict[str, str]  # other kernels of the mechanism and architecture: reason
    # On an H100; of decode, at least this on an H200. None on the CPU and for stripes.
    predicted_ms: float | None
    dense_ms: float | None  # `attention` on the same tokens
    density: float | None  # share of blocks listed, for block lists
    reachable_density: float | None  # the same, of the blocks that causality leaves
    break_even_density: float | None  # where block lists take as long as dense; inf: nowhere
    notes: tuple[str, ...]
    dq_kernel: str | None  # what finds the gradient of q; None: asking for it raises
    dkv_kernel: str | None  # the same for k and v
    fused_kernel: str | None  # what finds all of them at once where bits may vary; None: nothing
    why_two_kernels: str | None  # why nothing does, where there is such a kernel
    needs_gradients: bool  # q, k or v require a gradient
    copies_keys: bool = False  # whether these kernels run on copies of the keys that groups list
    read_bytes: int | None = None  # of a decode call: keys and values, q and out
    # What shares the keys of a decode call: splits, or on Hopper without fixed ones thread blocks.
    # None on other GPUs without fixed splits.
    parts: int | None = None

    @property
    def speedup(self) -> float | None:
        """Predicted speedup over dense attention."""
        if self.predicted_ms is None or self.dense_ms is None:
            return None
        return self.dense_ms / self.predicted_ms

    def __str__(self) -> str:
        lines = [f"{self.mechanism} on {self.arch}: {self.kernel or 'no kernel'}", f"  {self.why}"]
        if self.read_bytes is not None:
            parts = "" if self.parts is None else f" in {self.parts} parts"
            lines.append(f"  reads {self.read_bytes / 1e6:.2f} MB{parts}")
        if self.read_bytes is not None and self.predicted_ms is not None:
            lines.append(
                f"  at least {1e3 * self.predicted_ms:.1f} us on an H200, at the rate of a "
                f"read-only stream; all keys: {1e3 * (self.dense_ms or 0):.1f} us"
            )
        elif self.predicted_ms is not None:
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
        copies = "over copies of the keys that each group lists, " if self.copies_keys else ""
        found = "; ".join(f"{name} by {kernel}" for name, kernel in passes.items())
        if self.fused_kernel is None:
            why = f", as {self.why_two_kernels}" if self.why_two_kernels else ""
            return f"backward: {copies}{found}{why}; no atomics, so results repeat bitwise"
        return (
            f"backward: {copies}all gradients by {self.fused_kernel}, which adds dq up in an order "
            f"that varies; under torch.use_deterministic_algorithms {found}"
        )

    def why_not(self) -> str:
        """Lists the other kernels of the mechanism and architecture, one per line, with reasons."""
        rejected = (f"  not {name}: {reason}" for name, reason in self.rejected.items())
        return "\n".join(rejected) or "  there are no other rows"


def explain(
    function: Callable[..., object], /, *args: object, arch: str | None = None, **kwargs: object
) -> Explanation:
    """Explains which kernel a call would select and why, and predicts its time.

    Times are from a cost model of one H100 SXM (docs/simulator.md gives its accuracy). Nothing is
    run, so tensors on device "meta" work. Block lists, and what says which keys a decode call
    sees, are read, which waits for their device; on "meta" caches and lists count as full.

    Args:
        function: `sparse_fmha.attention`, `neighborhood_attention`, `block_sparse_attention`,
            `stripe_attention`, which has no cost model yet, or `decode_attention`: bytes and parts,
            and the time to read so many bytes, which no call is below.
        args, kwargs: arguments of the function, checked as in the function.
        arch: "cpu", or a GPU architecture such as "sm90"; default: that of q's device.

    Raises:
        ValueError: function is not one of these, arch is unknown, or arch is missing and q is on
            another device; also as in the function.
        TypeError: as in the function.
        ImportError: the extension `_C` is not available for this Python.
    """
    if function not in calls.DESCRIBED:
        names = _checks.one_of(f.__name__ for f in calls.DESCRIBED)
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
    mechanism, times, notes = calls.DESCRIBED[function](given, arch)
    skips = isinstance(given["skip_threshold"], Tensor) or given["skip_threshold"] > 0
    skips = skips or given["return_stats"]
    if skips and times is not None:
        notes = (*notes, "what skipping key tiles saves is not in the time")
    notes = (*notes, *_untested(arch, q.device))
    operands = (x for x in given.values() if isinstance(x, Tensor))
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    biased = given.get("key_bias") is not None or given.get("softcap", 0) != 0
    biased = biased and mechanism != "decode"  # whose kernels take a softcap, all of them
    tiles = () if skips or biased else times.tiles if times is not None else ()
    why_two = calls.why_two_kernels(function, given, skips)
    why_no_copies = calls.why_not_gathered(function, given, arch, skips)
    if mechanism == "stripe" and arch == "sm90" and why_no_copies and needs_gradients:
        notes = (*notes, f"its gradients copy no keys, as {why_no_copies}")
    launches = calls.launches(function, given) if arch == "sm90" else 1
    dilated = launches > 1 and not (skips or biased)
    if launches > 1:
        passes = "its gradients take" if dilated else "it takes"
        notes = (*notes, f"{passes} {launches} launches of each kernel, by the dilation")
    v = given["v_cache" if mechanism == "decode" else "v"]
    dims = q.shape[-1], v.shape[-1]
    return _choose(
        mechanism,
        arch,
        q,
        dims,
        skips,
        biased,
        dilated,
        times,
        tiles,
        notes,
        needs_gradients,
        why_two,
        why_no_copies is None,
    )


def _arch_of(device: torch.device) -> str | None:
    if device.type == "cuda":
        from sparse_fmha._extension import _C

        return _C.arch_override() or _C.arch_of_capability(
            *torch.cuda.get_device_capability(device)
        )
    return "cpu" if device.type == "cpu" else None


def _untested(arch: str, device: torch.device) -> tuple[str, ...]:
    """What is to be said of kernels on a device that they are not measured on."""
    if device.type != "cuda" or arch == "cpu":
        return ()
    from sparse_fmha._extension import _C

    major, minor = torch.cuda.get_device_capability(device)
    capability = f"compute capability {major}.{minor}"
    status = _C.arch_status(arch).get(f"{major}.{minor}")
    if status == "measured":
        return ()
    said = {
        "ran": f"{arch} was tested but not measured on {capability}",
        "compiled": f"{arch} was never run on {capability}",
        None: f"{capability} does not run {arch}",
    }
    if major in (10, 11):
        # mma.sync has a fraction of the rate of their own instructions: FlashAttention-2 reaches
        # 350 to 360 TFLOP/s on B200, cuDNN 1200 to 1600.
        return said[status], (
            f"cuDNN's dense attention is faster on {capability} until fewer than about a quarter "
            "of the pairs are seen"
        )
    return (said[status],)


def _choose(
    mechanism: str,
    arch: str,
    q: Tensor,
    dims: Dims,
    skips: bool,
    biased: bool,
    dilated: bool,
    times: Times | None,
    tiles: Sequence[TileTime],
    notes: tuple[str, ...],
    needs_gradients: bool,
    why_two_kernels: str | None,
    copies_keys: bool,
) -> Explanation:
    dtype = str(q.dtype).removeprefix("torch.")
    wanted_dims = _said(dims)
    decodes = mechanism == "decode"  # a pass of its own

    us = {tile.tile_q: tile.us for tile in tiles}

    def rows_of(direction: str) -> list[_build.KernelRow]:
        of_lists = _of_lists(mechanism, arch, skips, copies_keys)
        of_lists = of_lists if direction.startswith("backward") else None
        of = (of_lists, False) if of_lists else ("dense" if decodes else mechanism, skips)
        wanted = (arch, direction, *of)
        return [
            row
            for row in _build.kernels()
            if (row["arch"], row["pass"], row["mechanism"], row["skips"]) == wanted
        ]

    def takes_bias(row: _build.KernelRow) -> bool:
        optional = arch == "cpu" or row["pass"] != "forward"
        return row["key_bias"] == biased or (row["key_bias"] and optional)

    def takes_dilation(row: _build.KernelRow) -> bool:
        return row["dilated"] == (dilated and row["pass"] == "forward")

    def smallest(rows: list[_build.KernelRow]) -> _build.KernelRow | None:
        fits = [
            row
            for row in rows
            if row["dtype"] == dtype
            and _fits(row, dims)
            and takes_bias(row)
            and takes_dilation(row)
        ]
        taken = 0 if times is None else times.tile_q

        # Rows that differ in tile_q alone: the call's, the fastest by the model, or the first.
        def order(row: _build.KernelRow) -> tuple[Dims, bool, float]:
            return _dims(row), row["tile_q"] != taken, us.get(row["tile_q"], 0)

        return min(fits, key=order, default=None)

    def name_of(row: _build.KernelRow | None) -> str | None:
        return None if row is None else row["name"]

    rows = rows_of("decode" if decodes else "forward")
    best = smallest(rows)
    rejected = {}
    for row in rows:
        if row["dtype"] != dtype:
            reason = f"is for {row['dtype']}, q is {dtype}"
        elif not _fits(row, dims):
            reason = _too_small(row, dims)
        elif biased and not row["key_bias"]:
            reason = "takes no key_bias or softcap"
        elif not takes_bias(row):
            reason = "is for calls with key_bias or softcap"
        elif not takes_dilation(row):
            reason = f"is for {'smaller' if dilated else 'larger'} dilations"
        else:
            reason = _slower(row, best, tiles)
        if row is not best:
            rejected[row["name"]] = reason
    if best is not None:
        why = f"the smallest row for {dtype} whose head dim is at least {wanted_dims}"
        if sum(row["dtype"] == dtype and _dims(row) == _dims(best) for row in rows) > 1:
            why += "".join(f"; {tile}" for tile in tiles if tile.tile_q == best["tile_q"])
    elif rows:
        bias = " and key_bias or softcap" if biased else ""
        why = f"no row is for {dtype} with head dim {wanted_dims}{bias}: the call raises"
    else:
        why = f"this build has no {mechanism} kernel for {arch}: the call raises"
    fused = None if decodes else smallest(rows_of("backward_fused"))
    return Explanation(
        mechanism=mechanism,
        arch=arch,
        kernel=name_of(best),
        why=why,
        rejected=rejected,
        predicted_ms=None if times is None else _milliseconds(times.predicted_us),
        dense_ms=None if times is None else _milliseconds(times.dense_us),
        density=None if times is None else times.density,
        reachable_density=None if times is None else times.reachable_density,
        break_even_density=None if times is None else times.break_even,
        notes=notes,
        dq_kernel=None if decodes else name_of(smallest(rows_of("backward_dq"))),
        dkv_kernel=None if decodes else name_of(smallest(rows_of("backward_dkv"))),
        fused_kernel=name_of(None if why_two_kernels else fused),
        why_two_kernels=None if fused is None else why_two_kernels,
        needs_gradients=needs_gradients,
        copies_keys=copies_keys,
        read_bytes=None if times is None else times.read_bytes,
        parts=None if times is None else times.parts,
    )


def _of_lists(mechanism: str, arch: str, skips: bool, copies_keys: bool) -> str | None:
    """The mechanism of gradients by lists that are not the call's, if any: those of what was kept
    (csrc/ops/skipped_tiles.cpp), and block lists over copies (device/gathered_keys.h)."""
    if copies_keys:
        return "block_sparse"
    if not skips or arch != "sm90":
        return None
    return "stripe" if mechanism == "stripe" else "block_sparse"


def _slower(row: _build.KernelRow, best: _build.KernelRow | None, tiles: Sequence[TileTime]) -> str:
    """Why a row that could run the call is not taken."""
    if best is not None and _dims(row) == _dims(best):
        if row["pass"] == "decode":
            return f"is for {'few' if row['tile_q'] < best['tile_q'] else 'more'} rows"
        return "; ".join(str(tile) for tile in tiles if tile.tile_q == row["tile_q"]) or (
            "is for little work"
        )
    return f"takes head dims up to {_said(_dims(row))}, a smaller row fits"


def _dims(row: _build.KernelRow) -> Dims:
    return row["head_dim"], row["value_dim"]


def _said(dims: Dims) -> str:
    dim, value_dim = dims
    return str(dim) if dim == value_dim else f"{dim}, that of values {value_dim}"


def _fits(row: _build.KernelRow, dims: Dims) -> bool:
    of_one_dim = row["arch"] not in ("cpu", "sm90")
    enough = row["head_dim"] >= dims[0] and row["value_dim"] >= dims[1]
    return enough and (dims[0] == dims[1] or not of_one_dim)


def _too_small(row: _build.KernelRow, dims: Dims) -> str:
    if row["head_dim"] < dims[0]:
        return f"takes head dims up to {row['head_dim']}, q has {dims[0]}"
    if row["value_dim"] < dims[1]:
        return f"takes values of head dims up to {row['value_dim']}, v has {dims[1]}"
    return "takes values of q's head dim"


def _milliseconds(us: float | None) -> float | None:
    return None if us is None else us / 1e3
