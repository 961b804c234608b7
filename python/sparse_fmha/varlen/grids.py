"""Neighborhood attention of packed grids of different shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._ops import derivatives, errors
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.attention import neighborhood_attention
from sparse_fmha.attention._calls import op_checks
from sparse_fmha.varlen.checks import check_packed

Axes = int | tuple[int, ...]
Flags = bool | tuple[bool, ...]

BRANCHES = 3  # of a CUDA graph


@overload
def varlen_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[Sequence[int]],
    window: Axes | list[Axes],
    *,
    stride: Axes | list[Axes] = 1,
    dilation: Axes | list[Axes] = 1,
    causal: Flags | list[Flags] = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[Sequence[int]],
    window: Axes | list[Axes],
    *,
    stride: Axes | list[Axes] = 1,
    dilation: Axes | list[Axes] = 1,
    causal: Flags | list[Flags] = False,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def varlen_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[Sequence[int]],
    window: Axes | list[Axes],
    *,
    stride: Axes | list[Axes] = 1,
    dilation: Axes | list[Axes] = 1,
    causal: Flags | list[Flags] = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def varlen_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[Sequence[int]],
    window: Axes | list[Axes],
    *,
    stride: Axes | list[Axes] = 1,
    dilation: Axes | list[Axes] = 1,
    causal: Flags | list[Flags] = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Generalized neighborhood attention of packed samples, each with a grid of its own.

    The tokens of all samples are in one dimension, one sample after the other, each with its last
    axis fastest: a batch of images or videos of different sizes without padding. Every sample is
    attended as by `neighborhood_attention`.

    Args:
        q: `[T, Hq, D]`. For dtypes, strides and D see `attention`.
        k: `[T, Hkv, D]`; Hq is a multiple of Hkv.
        v: like k.
        grids: the shape of each sample in packing order, one to three axes; their sizes add up to
            T. They are read on the host.
        window, stride, dilation, causal: as in `neighborhood_attention`. An int (or bool) or a
            tuple is for all samples; a list has one of these for each sample.
        scale: factor of q.k; default `D**-0.5`. May be negative.
        return_lse: also return the log-sum-exp.

    Returns:
        `out`, `[T, Hq, D]`, contiguous, in q's dtype; with `return_lse` also `lse`, `[T, Hq]` in
        fp32, natural log.

    Samples that follow each other with the same grid and parameters are one call of the op, on a
    view of q, k and v, which writes to its part of the result where no gradient is wanted. For
    autocast and gradients see `attention`. Runs on the CPU and on CUDA.

    Raises:
        ValueError, TypeError: the sizes of the grids do not add up to T; a list does not have an
            entry for each sample; a window, stride or dilation does not fit a sample's grid, which
            the message names; or as in `attention`.
        RuntimeError: see `attention`.
    """
    check_packed(*cast_where_enabled(q, k, v))
    _checks.check_grid(q[None], k[None])
    scale = _checks.finite("scale", scale)
    samples = _samples(grids, window, stride, dilation, causal)
    tokens = sum(sample.tokens for sample in samples)
    if tokens != len(q):
        raise ValueError(f"grids must have the {len(q)} tokens of q, got {tokens}")
    runs = _runs(samples)
    into = len(runs) > 1 and op_checks(scale, q, k, v) and not _is_seen(q, k, v)
    out, lse = (_into_one if into else _joined)(q, k, v, runs, scale)
    return (out, lse) if return_lse else out


def _is_seen(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd, a transform or autocast has to see each call."""
    return derivatives.wanted(q, k, v) or torch.is_autocast_enabled(q.device.type)


def _parts(
    tensors: Sequence[Tensor], runs: list[tuple[_Sample, int]]
) -> Iterator[tuple[_Sample, list[Tensor]]]:
    """Views `[count, *grid, ...]` of the tokens of each run."""
    sizes = [count * sample.tokens for sample, count in runs]
    parts = zip(*(x.split(sizes) for x in tensors), strict=True)
    for (sample, count), views in zip(runs, parts, strict=True):
        yield sample, [x.view(count, *sample.grid, *x.shape[1:]) for x in views]


def _into_one(
    q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[_Sample, int]], scale: float | None
) -> tuple[Tensor, Tensor]:
    """Every call writes to its part of the results. Nobody has to see the calls (`_is_seen`).

    In a CUDA graph they are branches side by side, those with most tokens first: the last query
    tiles of one leave multiprocessors to the next. Elsewhere streams would cost more host time than
    they win.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    run = torch.ops.sparse_fmha.neighborhood_out
    try:
        with torch._C._AutoDispatchBelowAutograd(), _branches(q) as streams:
            parts = list(_parts((q, k, v, out, lse), runs))
            if len(streams) > 1:
                parts.sort(key=lambda part: -part[1][0].numel())
            for i, (sample, views) in enumerate(parts):
                with torch.cuda.stream(streams[i % len(streams)]):
                    run(*views, sample.window, sample.stride, sample.dilation, sample.causal, scale)
    except RuntimeError as refusal:
        raise errors.typed(refusal) from None
    return out, lse


def _joined(
    q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[_Sample, int]], scale: float | None
) -> tuple[Tensor, Tensor]:
    results = []
    for sample, views in _parts((q, k, v), runs):
        of_q, of_k, of_v = views
        out, lse = neighborhood_attention(
            of_q,
            of_k,
            of_v,
            sample.window,
            stride=sample.stride,
            dilation=sample.dilation,
            causal=sample.causal,
            scale=scale,
            return_lse=True,
        )
        results.append((out.flatten(0, -3), lse.flatten(0, -2)))
    out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*results, strict=True))
    return out, lse


@contextlib.contextmanager
def _branches(q: Tensor) -> Iterator[list[torch.cuda.Stream | None]]:
    """Streams of a graph that is captured, which meet again at the end; else the current one."""
    if not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield [None]
        return
    here = torch.cuda.current_stream(q.device)
    sides = [torch.cuda.Stream(q.device) for _ in range(BRANCHES - 1)]
    for side in sides:
        side.wait_stream(here)
    try:
        yield [here, *sides]
    finally:
        for side in sides:
            here.wait_stream(side)


class _Sample(NamedTuple):
    """The grid and the parameters of a sample."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


def _runs(samples: list[_Sample]) -> list[tuple[_Sample, int]]:
    """Returns equal samples that follow each other and how many; at least one run."""
    runs: list[tuple[_Sample, int]] = []
    for sample in samples:
        if runs and runs[-1][0] == sample:
            runs[-1] = sample, runs[-1][1] + 1
        else:
            runs.append((sample, 1))
    return runs or [(_Sample((1,), (1,), (1,), (1,), (False,)), 0)]


def _samples(grids: Any, window: Any, stride: Any, dilation: Any, causal: Any) -> list[_Sample]:
    """Checks the grids and parameters and returns those of each sample."""
    if not isinstance(grids, Sequence):
        raise TypeError(f"grids must be a sequence of shapes, got {type(grids).__name__}")
    given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    for name, value in given.items():
        if isinstance(value, list) and len(value) != len(grids):
            raise ValueError(
                f"{name} must have one entry for each of the {len(grids)} samples, got a list of "
                f"{len(value)}; a tuple or number is for all samples"
            )
    return [
        _sample(i, grid, {n: x[i] if isinstance(x, list) else x for n, x in given.items()})
        for i, grid in enumerate(grids)
    ]


def _sample(number: int, grid: Any, given: dict[str, Any]) -> _Sample:
    if not isinstance(grid, Sequence) or not 1 <= len(grid) <= 3:
        raise ValueError(f"grids[{number}] must be a shape of one to three axes, got {grid!r}")
    for size in grid:
        _checks.check_int(f"an axis of grids[{number}]", size)
    try:
        values = [
            _checks.per_axis(name, value, len(grid), *([bool] if name == "causal" else []))
            for name, value in given.items()
        ]
        _checks.check_neighborhood(grid, *values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"sample {number} with the grid {list(grid)}: {error}") from None
    own, wide, step, apart, ends = (tuple(x) for x in (grid, *values))
    return _Sample(own, wide, step, apart, tuple(bool(x) for x in ends))
