"""Defines every result in fp64, token by token; the tests compare with it.

Nothing here depends on how the kernels work. A mechanism is a boolean mask (True: the query sees
the key), built from the formulas of docs/design.md. `attention` is exact softmax attention under
any mask. Query rows are processed in chunks to bound memory, apart from the mask itself. Everything
runs on any device and is differentiable.

Masks index tokens; a grid is flattened in row-major order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Device = torch.device | str

_CHUNK = 1 << 24  # scores in memory at a time


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention under a mask.

    Args:
        q: [B, *Lq, Hq, D], any floating dtype. The token axes are flattened to Lq tokens.
        k: [B, *Lk, Hkv, D]; Hq is a multiple of Hkv, and q head h reads head h * Hkv // Hq.
        v: [B, *Lk, Hkv, Dv].
        visible: bool, broadcastable to [B, Hq, Lq, Lk].
        scale: factor of q.k; D**-0.5 by default.

    Returns:
        out [B, *Lq, Hq, Dv] fp64, and lse [B, *Lq, Hq] fp64, the natural logarithm of the sum of
        exp(scale * q.k) over the visible keys. A row that sees no key has out 0 and lse -inf.

    Raises:
        TypeError: visible is not bool.
        ValueError: the shapes do not match.
    """
    shape = q.shape
    q, k, v = _flatten(q, k, v)
    (batch, len_q, heads, dim), (len_kv, heads_kv) = q.shape, k.shape[1:3]
    visible = _expand(visible, (batch, heads, len_q, len_kv))
    scale = dim**-0.5 if scale is None else scale
    group = heads // max(1, heads_kv)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=torch.float64)
    lse = q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float64)
    rows = max(1, _CHUNK // max(1, group * len_kv))
    for b in range(batch if len_kv else 0):
        for h in range(heads_kv):
            own = slice(h * group, (h + 1) * group)
            keys, values = k[b, :, h].double(), v[b, :, h].double()
            for i in range(0, len_q, rows):
                part = slice(i, i + rows)
                scores = scale * (q[b, part, own].double().transpose(0, 1) @ keys.T)
                scores = scores.masked_fill(~visible[b, own, part], -torch.inf)
                total = scores.logsumexp(-1)
                weights = (scores - total.masked_fill(total == -torch.inf, 0)[..., None]).exp()
                out[b, part, own] = (weights @ values).transpose(0, 1)
                lse[b, part, own] = total.T
    return out.reshape(*shape[:-1], v.shape[-1]), lse.reshape(shape[:-1])


def skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    skip_threshold: float | Tensor,
    row_groups: int | Tensor = 64,
    key_tiles: int | Tensor = 128,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that skips key tiles whose scores are far below the running maximum (BLASST).

    A group of rows visits the key tiles that hold a key visible to it, in ascending rank. Let mt be
    a row's maximum of scale * q.k over the visible keys of the tile, and m its maximum over the
    tiles visited before. The tile is skipped iff mt - m < ln(skip_threshold) for every row of the
    group that sees a key of it. So the first tile is never skipped, a skipped tile never raises m,
    and the result is exact attention over the remaining keys.

    Args:
        q, k, v, visible, scale: see `attention`.
        skip_threshold: lambda, 0 <= lambda < 1: a float, or a tensor [B]. 0 skips nothing.
        row_groups: the group of each query row, int64 [Lq]; or an int, the rows per group.
        key_tiles: the rank of each key's tile in visiting order, int64 [Lk], or [groups, Lk] where
            groups differ; or an int, the keys per tile in ascending order. See `tile_ranks`.

    Returns:
        out and lse as in `attention`, and skipped, bool [B, Hq, groups, tiles]. A tile without a
        key visible to the group is not visited, so it is not skipped either.

    Raises:
        TypeError, ValueError: see `attention`; also for a threshold outside [0, 1).
    """
    shape = q.shape
    q, k, v = _flatten(q, k, v)
    (batch, len_q, heads, dim), (len_kv, heads_kv) = q.shape, k.shape[1:3]
    visible = _expand(visible, (batch, heads, len_q, len_kv)).clone()
    limit = torch.as_tensor(skip_threshold, dtype=torch.float64, device=q.device)
    if not bool(((limit >= 0) & (limit < 1)).all()):
        raise ValueError(f"skip_threshold must be at least 0 and less than 1, got {skip_threshold}")
    if isinstance(row_groups, int):
        row_groups = tile_ranks(len_q, row_groups, device=q.device)
    if isinstance(key_tiles, int):
        key_tiles = tile_ranks(len_kv, key_tiles, device=q.device)
    groups = int(row_groups.max()) + 1 if len_q else 0
    tiles = int(key_tiles.max()) + 1 if len_kv else 0
    key_tiles = key_tiles.expand(groups, len_kv)
    limit = limit.log().expand(batch)[:, None, None, None]
    scale = dim**-0.5 if scale is None else scale
    keys = k.double().transpose(1, 2).repeat_interleave(heads // max(1, heads_kv), dim=1)
    skipped = torch.zeros(batch, heads, groups, tiles, dtype=torch.bool, device=q.device)
    for g in range(groups if tiles else 0):
        rows = (row_groups == g).nonzero()[:, 0]
        seen = visible[:, :, rows]
        scores = scale * (q[:, rows].double().transpose(1, 2) @ keys.mT)
        scores = scores.masked_fill(~seen, -torch.inf)
        tile = key_tiles[g].expand_as(scores)
        top = scores.new_full((*scores.shape[:3], tiles), -torch.inf)
        top = top.scatter_reduce(-1, tile, scores, "amax")
        before = top.cummax(-1).values.roll(1, -1)
        before[..., 0] = -torch.inf
        unseen = top == -torch.inf
        skipped[:, :, g] = (unseen | (top - before < limit)).all(2) & ~unseen.all(2)
        visible[:, :, rows] = seen & ~skipped[:, :, g].gather(-1, tile[:, :, 0])[:, :, None]
    out, lse = attention(q, k, v, visible, scale)
    return out.reshape(*shape[:-1], v.shape[-1]), lse.reshape(shape[:-1]), skipped


def tile_ranks(length: int, size: int, descending: bool = False, device: Device = "cpu") -> Tensor:
    """Returns the rank of each token's tile, int64 [length], for tiles of `size` tokens.

    Tiles are visited first to last, or last to first with `descending`.
    """
    ranks = torch.arange(length, device=device) // size
    return (length - 1) // size - ranks if descending else ranks


def causal_mask(len_q: int, len_kv: int, device: Device = "cpu") -> Tensor:
    """Bool [len_q, len_kv]: the last query sees every key, each earlier one sees one key less."""
    i = torch.arange(len_q, device=device)[:, None]
    j = torch.arange(len_kv, device=device)
    return j <= i + (len_kv - len_q)


def neighborhood_mask(
    grid: int | Iterable[int],
    window: int | Iterable[int],
    stride: int | Iterable[int] = 1,
    dilation: int | Iterable[int] = 1,
    causal: bool | Iterable[bool] = False,
    extra: int = 0,
    device: Device = "cpu",
) -> Tensor:
    """The mask of generalized neighborhood attention (arXiv 2504.16922).

    Args:
        grid: tokens per axis, a tuple (or an int for one axis).
        window, stride, dilation, causal: one value for all axes, or one per axis.
        extra: number of extra keys, which every query sees. They follow the grid's keys, as in
            torch.cat([k.flatten(1, -3), extra_k], 1).

    Returns:
        bool [tokens, tokens + extra].

    Raises:
        ValueError: an axis violates 1 <= window, 1 <= stride <= window, 1 <= dilation, or
            window * dilation <= tokens (unless the axis is causal); or the number of values is not
            the number of axes.
    """
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    options = (
        _per_axis("window", window, len(grid)),
        _per_axis("stride", stride, len(grid)),
        _per_axis("dilation", dilation, len(grid)),
        _per_axis("causal", causal, len(grid)),
    )
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in zip(grid, *options, strict=True):
        one = _axis_mask(*axis, device)
        mask = mask[:, None, :, None] & one[None, :, None, :]
        mask = mask.flatten(2, 3).flatten(0, 1)
    return torch.nn.functional.pad(mask, (0, extra), value=True)


def _axis_mask(
    length: int, window: int, stride: int, dilation: int, causal: int, device: Device
) -> Tensor:
    if not (
        window >= 1
        and 1 <= stride <= window
        and dilation >= 1
        and (length > 0 if causal else window * dilation <= length)
    ):
        raise ValueError(
            "stride must be from 1 to window, dilation at least 1 and, unless the axis is causal, "
            f"window * dilation at most the {length} tokens of the axis, got window {window}, "
            f"stride {stride} and dilation {dilation}"
        )
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)
    residue, p, t = i % dilation, i // dilation, j // dilation
    count = length // dilation + (residue < length % dilation)  # tokens of this residue
    if causal:
        leader = torch.minimum(p // stride * stride + stride - 1, count - 1)
        begin, end = (leader - window + 1).clamp(min=0), p + 1
    else:
        leader = torch.minimum(p // stride * stride + stride // 2, count - 1)
        begin = torch.minimum((leader - window // 2).clamp(min=0), count - window)
        end = begin + window
    return (j % dilation == residue) & (begin <= t) & (t < end)


def block_sparse_mask(
    counts: Tensor,
    indices: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    partial_counts: Tensor | None = None,
    partial_indices: Tensor | None = None,
    partial_masks: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """The mask of block lists. Queries and keys are divided into blocks; the last may be ragged.

    Args:
        counts: int [B|1, H|1, nQ], the length of each query block's list of full key blocks.
        indices: int [B|1, H|1, nQ, max], the lists; entries beyond the count are ignored.
        partial_counts, partial_indices: the same for the partial key blocks.
        partial_masks: bool [B|1, H|1, nQ, max, block_q, block_kv], visible pairs of partial blocks.
        causal: key j is visible to query i only if j <= i + kv_len - q_len.

    Returns:
        bool [B|1, H|1, q_len, kv_len]

    Raises:
        ValueError: the lists of a query block name a block that does not exist, or one twice.
    """
    blocks_q, blocks_kv = -(-q_len // block_q), -(-kv_len // block_kv)
    mask = torch.zeros(
        *counts.shape[:2],
        blocks_q * block_q,
        blocks_kv * block_kv,
        dtype=torch.bool,
        device=counts.device,
    )
    for b, h, n in itertools.product(*map(range, counts.shape)):
        entries: list[tuple[int, bool | Tensor]] = [
            (i, True) for i in indices[b, h, n, : counts[b, h, n]].tolist()
        ]
        if not (partial_counts is None or partial_indices is None or partial_masks is None):
            listed = partial_indices[b, h, n, : partial_counts[b, h, n]].tolist()
            entries += zip(listed, partial_masks[b, h, n], strict=False)
        _check_list("indices", (b, h, n), [i for i, _ in entries], blocks_kv)
        for i, pairs in entries:
            mask[b, h, n * block_q :, i * block_kv :][:block_q, :block_kv] = pairs
    mask = mask[:, :, :q_len, :kv_len]
    return mask & causal_mask(q_len, kv_len, mask.device) if causal else mask


def stripe_mask(
    columns: Tensor,
    counts: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    range_starts: Tensor | None = None,
    range_counts: Tensor | None = None,
    range_size: int = 64,
    causal: bool = False,
) -> Tensor:
    """The mask of stripes: single key positions, and runs of keys.

    Args:
        columns: int [B|1, H|1, groups, max], key positions seen by a group of block_q query rows,
            ascending. Entries beyond the count are ignored.
        counts: int [B|1, H|1, groups].
        range_starts, range_counts: the same for the first keys of runs of range_size keys. A run
            may extend beyond the last key.
        causal: key j is visible to query i only if j <= i + kv_len - q_len.

    Returns:
        bool [B|1, H|1, q_len, kv_len]

    Raises:
        ValueError: a position does not exist, or is listed twice in columns and runs together.
    """
    mask = torch.zeros(*counts.shape[:2], q_len, kv_len, dtype=torch.bool, device=counts.device)
    for b, h, n in itertools.product(*map(range, counts.shape)):
        listed = columns[b, h, n, : counts[b, h, n]].tolist()
        if range_starts is not None and range_counts is not None:
            for start in range_starts[b, h, n, : range_counts[b, h, n]].tolist():
                listed += range(start, max(start + 1, min(start + range_size, kv_len)))
        _check_list("columns and ranges", (b, h, n), listed, kv_len)
        mask[b, h, n * block_q : (n + 1) * block_q, listed] = True
    return mask & causal_mask(q_len, kv_len, mask.device) if causal else mask


def _check_list(name: str, where: tuple[int, int, int], listed: Sequence[int], end: int) -> None:
    if len(set(listed)) < len(listed) or any(not 0 <= i < end for i in listed):
        raise ValueError(
            f"{name} of (batch, head, query block) {where} must list each of 0 to {end - 1} at "
            f"most once, got {listed}"
        )


def _per_axis(name: str, value: int | Iterable[int], axes: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise ValueError(
            f"{name} must have one entry for each of the {axes} axes of the grid, got {value}"
        )
    return values


def _flatten(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the shapes and flattens the token axes to one."""
    shapes = f"got shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    if min(q.dim(), k.dim(), v.dim()) < 4:
        raise ValueError(f"q, k and v must have shape [B, *L, H, D], {shapes}")
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must have one B and D, and v the shape of k but for the last size, {shapes}"
        )
    heads, heads_kv = q.shape[2], k.shape[2]
    if heads % heads_kv if heads_kv else heads:
        raise ValueError(f"heads of q must be a multiple of those of k, {shapes}")
    return q, k, v


def _expand(visible: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    if visible.dtype != torch.bool:
        raise TypeError(f"visible must have dtype torch.bool, got {visible.dtype}")
    try:
        return visible.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"visible must broadcast to [B, Hq, Lq, Lk] = {list(shape)}, got shape "
            f"{tuple(visible.shape)}"
        ) from None
