"""MMInference's grid heads: equidistant keys that all see, and queries that see all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha import _checks
from sparse_fmha._checks import (
    check_collection,
    check_int,
    check_number,
    check_q_and_k,
    check_qkv_of_one_dim,
    plain_ints,
)
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention import block_sparse_attention, stripe_attention
from sparse_fmha.attention.row_copies import replace_rows, take_rows
from sparse_fmha.masks import block_lists, stripe_checks
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.selection.reductions import score_sums

ROWS, KEYS = 64, 128  # block sizes of the mask of the grid's queries


class GridLines(NamedTuple):
    """Stride and phase of each head's grid, int64 `[B|1, Hq]`."""

    stride: Tensor
    phase: Tensor


@plain_ints
def mminference_grid_lines(
    q: Tensor,
    k: Tensor,
    strides: Sequence[int],
    *,
    last: int = 64,
    slack: float = 0.25,
    scale: float | None = None,
) -> GridLines:
    """Finds the stride and the phase of each head's grid from the last queries.

        c[j]    = sum over the last `last` queries of their causal softmax at key j,
        m(s, p) = mean of c[j] over the keys j with j mod s == p,
        the head's (s, p) is where m is largest; or, of the candidates that divide this s and whose
        mean is at least `1 - slack` of that, the smallest, and the phase where its own is largest.

    Source: Li et al. 2025, "MMInference: Accelerating Pre-filling for Long-Context VLMs via
    Modality-Aware Permutation Sparse Attention", arXiv:2504.16083, online search of grid heads; 64
    queries. The paper leaves open how a view of the map by a stride is reduced; the mean lets
    strides of different size compete. Some lines of a grid are a grid of a multiple of its stride,
    with the same mean but for noise, and half of a grid's stride has half of its mean: hence the
    slack. Ties take the first stride, then the first phase.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        strides: candidates, at least 1 and at most Lkv each; in a video the tokens of a frame, of a
            row of patches, and so on.
        last: how many of the last queries to use; Lq if there are fewer.
        slack: from 0 to 1; see above.
        scale: scale of q.k; default `D**-0.5`.

    Returns:
        Stride and phase, int64 `[B, Hq]`. Does not wait for the device.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_collection("strides", strides)
    check_q_and_k(q, k)
    q_len, kv_len = q.shape[1], k.shape[1]
    strides = _check_strides(strides, q_len, kv_len)
    slack = check_number("slack", slack, 0, 1)
    sums = score_sums(q, k, rows=last, causal=True, scale=scale)
    best, phases = [], []
    for candidate in strides:
        lines = pad(sums, (0, -kv_len % candidate)).unflatten(-1, (-1, candidate)).sum(-2)
        phase = torch.arange(candidate, device=q.device)
        means = lines / ((kv_len - phase + candidate - 1) // candidate)
        most, at = means.max(-1)
        best.append(most)
        phases.append(at)
    means = torch.stack(best, -1)
    most, largest = means.max(-1)
    chosen = largest
    for n, candidate in sorted(enumerate(strides), key=lambda one: -one[1]):
        near = means[..., n] >= (1 - slack) * most
        divides = torch.zeros_like(near)
        for m, multiple in enumerate(strides):
            if multiple > candidate and multiple % candidate == 0:
                divides |= largest == m
        chosen = chosen.masked_fill(near & divides, n)
    stride = torch.zeros_like(chosen)
    for n, candidate in enumerate(strides):
        stride += candidate * (chosen == n)
    chosen = chosen[..., None]
    return GridLines(stride, torch.stack(phases, -1).gather(-1, chosen)[..., 0])


@plain_ints
def mminference_grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strides: Sequence[int],
    *,
    lines: GridLines | None = None,
    last: int = 64,
    scale: float | None = None,
    block_q: int = 1024,
) -> Tensor:
    """Computes causal attention of grid heads.

        query i, at position p_i = i + Lkv - Lq, sees key j <= p_i iff
        j mod s == p or p_i mod s == p, with the head's stride s and phase p.

    Source: as for `mminference_grid_lines`. There, a kernel permutes tokens by address; here, one
    launch gathers the grid's keys for all queries, and one computes the grid's queries, whose rows
    are gathered and replace those of the first. Away from the grid the first queries see nothing,
    and their output is 0.

    Args:
        q: `[B, Lq, Hq, D]`. k, v: `[B, Lkv, Hkv, D]`, Lkv >= Lq, as in `attention`.
        strides: candidates; the heads' strides must be among them, which is not checked.
        lines: the grid of each head; default: `mminference_grid_lines` of q, k and `last`.
        last: see there.
        scale: scale of q.k; default `D**-0.5`.
        block_q: queries that share a list of keys, a multiple of 64 up to 2048. Lists take
            `4 * Lkv / min(strides)` bytes for each group and head.

    Returns:
        `[B, Lq, Hq, D]` in q's dtype. Does not wait for the device.

    Raises:
        ValueError, TypeError, RuntimeError: a shape, dtype or number is not allowed, or as in
            `stripe_attention`.
    """
    check_qkv_of_one_dim(q, k, v, axes=(1,))
    scale = _checks.finite("scale", scale)
    q_len, kv_len = q.shape[1], k.shape[1]
    strides = _check_strides(strides, q_len, kv_len)
    if lines is None:
        lines = mminference_grid_lines(q, k, strides, last=last, scale=scale)
    _check_lines(lines, q)
    out = stripe_attention(q, k, v, _grid_keys(lines, strides, q_len, kv_len, block_q), scale=scale)
    rows = _grid_rows(lines, strides, q_len, kv_len).expand(q.shape[0], -1, -1)
    mask = _rows_mask(rows, strides, q_len, kv_len)
    queries = take_rows(q, rows.clamp(max=q_len - 1)) if q_len else q
    return replace_rows(out, block_sparse_attention(queries, k, v, mask, scale=scale), rows)


def _grid_keys(
    lines: GridLines, strides: Sequence[int], q_len: int, kv_len: int, block_q: int
) -> StripeMask:
    """Returns the mask of the grid's keys, for all queries."""
    stripe_checks.check_sizes(q_len, kv_len, block_q, 64, True)
    stride, phase = (part[..., None] for part in lines)
    slot = torch.arange(ceil_div(kv_len, min(strides)), device=stride.device)
    groups = torch.arange(1, ceil_div(q_len, block_q) + 1, device=stride.device) * block_q
    ends = groups.clamp(max=q_len) + (kv_len - q_len)
    counts = ((ends - phase + stride - 1).div(stride, rounding_mode="floor")).clamp(min=0)
    columns = (phase + stride * slot)[:, :, None].expand(-1, -1, len(groups), -1)
    columns = torch.where(slot < counts[..., None], columns, block_lists.ABSENT)
    return StripeMask(columns.int(), counts.int(), q_len, kv_len, block_q, causal=True)


def _grid_rows(lines: GridLines, strides: Sequence[int], q_len: int, kv_len: int) -> Tensor:
    """Returns the grid's queries, int64 `[B|1, Hq, n]`, ascending; q_len past the last."""
    stride, phase = (part[..., None] for part in lines)
    first = (phase - (kv_len - q_len)).remainder(stride)
    slot = torch.arange(ceil_div(q_len, min(strides)), device=stride.device)
    return (first + stride * slot).clamp(max=q_len)


def _rows_mask(rows: Tensor, strides: Sequence[int], q_len: int, kv_len: int) -> BlockMask:
    """Returns the mask of gathered queries `[B, H, n]`, each of which sees the keys up to its own.

    Blocks of rows that are all past the last query have no keys.
    """
    n = rows.shape[2]
    blocks, columns = ceil_div(n, ROWS), ceil_div(kv_len, KEYS)
    limits = (rows + (kv_len - q_len + 1)).clamp(max=kv_len)
    limits = pad(limits, (0, blocks * ROWS - n), value=kv_len).unflatten(-1, (blocks, ROWS))
    some = pad(rows, (0, blocks * ROWS - n), value=q_len).unflatten(-1, (blocks, ROWS))[..., 0]
    some = some < q_len
    begin = limits[..., 0].div(KEYS, rounding_mode="floor") * some
    end = ceil_div(limits[..., -1], KEYS) * some
    number = torch.arange(columns, dtype=torch.int32, device=rows.device)
    indices = torch.where(number < begin[..., None], number, block_lists.ABSENT)
    # The rows of a block span less than ROWS strides.
    width = min(columns, ceil_div(ROWS * max(strides), KEYS) + 1)
    partial = begin[..., None] + torch.arange(width, device=rows.device)
    bits = block_lists.interval_bits(
        torch.zeros_like(limits[..., None, :]),
        (limits[..., None, :] - partial[..., None] * KEYS).clamp(min=0),
        KEYS,
    )
    listed = partial < end[..., None]
    return BlockMask(
        begin.int(),
        indices,
        *(n, kv_len, ROWS, KEYS),
        partial_counts=listed.sum(-1, dtype=torch.int32),
        partial_indices=torch.where(listed, partial, block_lists.ABSENT).int(),
        partial_bits=bits,
    )


def _check_strides(strides: Sequence[int], q_len: int, kv_len: int) -> list[int]:
    if kv_len < q_len:
        raise ValueError(f"k must have at least the {q_len} tokens of q, got {kv_len}")
    values = [check_int(f"strides[{n}]", stride, 1) for n, stride in enumerate(strides)]
    if not values:
        raise ValueError("strides must have at least one entry, got none")
    if max(values) > max(kv_len, 1):
        raise ValueError(f"strides must be at most the {kv_len} tokens of k, got {max(values)}")
    return values


def _check_lines(lines: GridLines, q: Tensor) -> None:
    for name, tensor in (("stride", lines[0]), ("phase", lines[1])):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            kind = getattr(tensor, "dtype", type(tensor))
            raise TypeError(f"lines.{name} must be an int64 tensor, got {kind}")
        if tensor.dim() != 2 or tensor.shape[0] not in (1, q.shape[0]):
            fits = False
        else:
            fits = tensor.shape[1] == q.shape[2] and tensor.shape == lines[0].shape
        if not fits:
            raise ValueError(
                f"lines.{name} must have shape [{q.shape[0]} or 1, {q.shape[2]}], one for both, "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"lines.{name} must be on q's device, {q.device}, got {tensor.device}")
