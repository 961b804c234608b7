"""Selection of blocks by their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_floats, check_int, check_number
from sparse_fmha._sizes import CACHED, SLICE
from sparse_fmha.masks import block_lists
from sparse_fmha.selection import largest, shares

LONG = 1 << 18  # rows at least this long: on the CPU, finding a share by bits beats a sort
FIXED = 40  # fractional bits of the fixed-point sums of probabilities
ROUNDING = 1e-9  # 0.1 * 30 counts as 3, although it is slightly more in floating point


def top_k_blocks(
    scores: Tensor,
    k: int | Sequence[int] | Tensor | None = None,
    *,
    density: float | Sequence[float] | None = None,
) -> Tensor:
    """Selects the k largest scores of each row.

    -inf and NaN are never taken, so a row may have fewer than k. Ties take the lowest index: all
    scores above the k-th largest value are taken, then the first of those equal to it.

    Args:
        scores: `[..., n]` of a floating point dtype.
        k: how many to take, at least 0, clamped to n. One int for all rows; a sequence or an
            integer tensor `[H]` with one for each head of scores `[..., H, nQ, n]`; or an integer
            tensor that broadcasts to `[..., 1]`, with one for each row. The host does not read a
            tensor: negative entries count as 0. A sequence is copied to the device, which a CUDA
            graph cannot capture.
        density: the share of each row's blocks to take instead of k, 0 to 1, rounded up; a sequence
            has one for each head of scores `[..., H, nQ, n]`. Blocks with score -inf or NaN, such
            as those hidden by causality, do not count.

    Returns:
        Bool `[..., n]`.

    Raises:
        ValueError: k is negative, does not have one entry per head, or does not broadcast; density
            is not in [0, 1]; both or neither of k and density are given.
        TypeError: scores is not a floating point tensor, or k or density has a wrong type.
    """
    _check_rows("scores", scores)
    if (k is None) == (density is None):
        given = "neither" if k is None else "both"
        raise ValueError(f"exactly one of k and density must be given, got {given}")
    if k is None:
        return _top_share(scores, shares_of("density", density, scores))
    if isinstance(k, Tensor | Sequence):
        return _top_counts(scores, *_counts_of(k, scores))
    return _top_fixed(scores, check_int("k", k))


def top_k_indices(
    scores: Tensor,
    k: int | Sequence[int] | Tensor | None = None,
    *,
    density: float | Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `top_k_blocks`, as lists: counts int32 `[...]` and indices int32 `[..., width]`.

    Indices ascend, with -1 past the count. The width is the largest k, at most n; n if k is a
    tensor. For scores `[B, H, nQ, nK]`, `BlockMask` takes both.

    Arguments and errors as in `top_k_blocks`.
    """
    if density is None and k is not None and not isinstance(k, (Tensor, Sequence)):
        _check_rows("scores", scores)
        width = min(check_int("k", k), scores.shape[-1])
        if largest.applies(scores, width):
            return _largest_indices(scores, width)
    blocks = top_k_blocks(scores, k, density=density)
    if density is not None:
        width = _share_of(max(shares_of("density", density, scores)), scores.shape[-1])
    elif isinstance(k, Tensor):
        width = scores.shape[-1]
    elif isinstance(k, Sequence):
        width = max(k, default=0)
    else:
        assert k is not None  # top_k_blocks refuses that
        width = k
    return block_lists.list_blocks(blocks, width)


def _largest_indices(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k_indices` without a map of all scores."""
    *lead, n = scores.shape
    rows = scores.detach().reshape(-1, n)
    parts = block_lists.chunks(rows.shape[0], n, rows.device, CACHED)
    counts, indices = block_lists.by_chunks(
        lambda part: largest.largest(rows[part], k), parts, rows.shape[0], 0
    )
    return counts.view(lead), indices.view(*lead, k)


def _top_fixed(scores: Tensor, k: int) -> Tensor:
    k = min(k, scores.shape[-1])
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if block_lists.is_launches(scores):
        return _first_sorted(scores.detach(), k)

    def choose(rows: Tensor) -> Tensor:
        rows = torch.where(rows > -torch.inf, rows, -torch.inf)
        last = rows.topk(k, -1, sorted=False).values.amin(-1, keepdim=True)
        return _first_from(rows, last, k)

    return _by_rows(choose, scores)


def _first_sorted(scores: Tensor, k: int) -> Tensor:
    """Selects the k largest scores of each row in few kernels."""
    rows = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    values, order = (x[..., :k] for x in rows.sort(dim=-1, descending=True, stable=True))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, order, values > -torch.inf)


def shares_of(name: str, value: object, scores: Tensor) -> list[float]:
    """A share from 0 to 1 for all heads of scores `[..., H, nQ, n]`, or one for each of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [check_number(name, value, 0, 1)]  # type: ignore[arg-type]
    if scores.dim() < 3 or len(value) != scores.shape[-3]:
        raise ValueError(
            f"{name} must be one number, or one for each head of {list(scores.shape)}, got "
            f"{len(value)}"
        )
    return [check_number(f"{name}[{i}]", entry, 0, 1) for i, entry in enumerate(value)]


def _top_share(scores: Tensor, densities: list[float]) -> Tensor:
    most = _share_of(max(densities, default=0.0), scores.shape[-1])
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)

    def counts(rows: Tensor, density: float | Tensor) -> Tensor:
        there = (rows > -torch.inf).sum(-1, keepdim=True)
        return (there.double() * density - ROUNDING).ceil().long()

    if len(densities) == 1:
        return _by_rows(lambda x: _first_counts(x, counts(x, densities[0]), most), scores)
    each = torch.tensor(densities, dtype=torch.float64, device=scores.device)[:, None, None]
    each = each.expand(*scores.shape[:-1], 1)
    return _by_rows(lambda x, share: _first_counts(x, counts(x, share), most), scores, each)


def _top_counts(scores: Tensor, counts: Tensor, most: int) -> Tensor:
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)

    def choose(rows: Tensor, counts: Tensor) -> Tensor:
        return _first_counts(rows, counts, most)

    return _by_rows(choose, scores, counts.expand(*scores.shape[:-1], 1))


def _first_counts(rows: Tensor, counts: Tensor, most: int) -> Tensor:
    """Selects the largest scores of each row `[n, columns]`: its count `[n, 1]`, at most `most`."""
    rows = torch.where(rows > -torch.inf, rows, -torch.inf)
    ordered = rows.topk(most, -1).values
    last = ordered.gather(-1, (counts - 1).clamp(0, most - 1))
    return _first_from(rows, last, counts) & (counts > 0)


def _first_from(rows: Tensor, last: Tensor, count: int | Tensor) -> Tensor:
    """Selects scores above `last`, the `count`-th largest, and the first equal ones that fit."""
    larger, equal = rows > last, (rows == last) & (rows > -torch.inf)
    room = count - larger.sum(-1, keepdim=True, dtype=torch.int32)
    return larger | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def _counts_of(k: Sequence[int] | Tensor, scores: Tensor) -> tuple[Tensor, int]:
    """Returns k as int64 that broadcasts to `[..., 1]`, and its maximum (n if k is a tensor)."""
    n = scores.shape[-1]
    if isinstance(k, Tensor):
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise TypeError(f"k must have an integer dtype, got {k.dtype}")
        if k.device != scores.device:
            raise ValueError(f"k must be on the device of scores, {scores.device}, got {k.device}")
        counts, most = k.long().clamp(max=n), n
    else:
        entries = [min(check_int(f"k[{i}]", entry), n) for i, entry in enumerate(k)]
        counts = torch.tensor(entries, dtype=torch.int64, device=scores.device)
        most = max(entries, default=0)
    if counts.dim() == 1:
        heads = scores.shape[-3] if scores.dim() >= 3 else None
        if len(counts) != heads:
            raise ValueError(
                "k must have one entry for each head of scores [..., heads, query blocks, key "
                f"blocks], of shape {list(scores.shape)}, got {len(counts)} entries"
            )
        counts = counts[:, None, None]
    rows = (*scores.shape[:-1], 1)
    try:
        fits = torch.broadcast_shapes(counts.shape, rows) == rows
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"k must have a shape that broadcasts to {list(rows)}, got {list(counts.shape)}"
        )
    return counts, most


def _share_of(density: float, n: int) -> int:
    """Returns n * density, rounded up."""
    return math.ceil(n * density - ROUNDING)


def top_p_blocks(
    probabilities: Tensor,
    p: float | Tensor,
    *,
    min_blocks: int = 1,
    max_blocks: int | None = None,
) -> Tensor:
    """Selects the fewest blocks of each row whose probabilities sum to p or more.

    Blocks are taken in descending order, ties by lowest index (a stable sort). Probabilities are
    summed in fixed point, in units of 2^-40, so the order of summation does not matter and CPU and
    CUDA give the same result. Entries that are not above 0, or NaN, are never taken. A row that
    sums to less than p is taken whole.

    Args:
        probabilities: `[..., n]` of a floating point dtype; clamped to 1.
        p: at least 0, or a tensor that broadcasts to `[..., 1]`, with one p for each row.
        min_blocks, max_blocks: bounds for each row, as far as it has entries above 0.

    Returns:
        Bool `[..., n]`.

    Raises:
        ValueError: p is negative, or `min_blocks` is below 1 or above `max_blocks`.
        TypeError: an argument has a wrong type.
    """
    _check_rows("probabilities", probabilities)
    n = probabilities.shape[-1]
    check_int("min_blocks", min_blocks, 1)
    if max_blocks is not None:
        check_int("max_blocks", max_blocks, min_blocks)
    most = n if max_blocks is None else min(n, max_blocks)
    one = 1 << FIXED
    if isinstance(p, Tensor):
        check_floats("p", p)
        limit = (p.double() * one).long()
    else:
        fixed = fixed_point(check_number("p", p, 0, 1 << 20))
        limit = torch.full((), fixed, dtype=torch.int64, device=probabilities.device)
    limit = limit.expand(*probabilities.shape[:-1], 1)
    if n >= LONG and (min_blocks, most) == (1, n) and largest.looks(probabilities):
        rows = probabilities.detach().reshape(-1, n)
        limits = limit.reshape(-1).tolist()
        if all(each > 0 for each in limits):
            pairs = zip(rows, limits, strict=True)
            taken = [shares.smallest_share(row, each, one) for row, each in pairs]
            return (torch.stack(taken) if len(taken) > 1 else taken[0]).view(probabilities.shape)
    slots = torch.arange(n, device=probabilities.device)

    def choose(rows: Tensor, limit: Tensor) -> Tensor:
        rows = torch.where(rows > 0, rows, 0).float()
        values, order = rows.sort(dim=-1, descending=True, stable=True)
        before = masses_before(values)
        taken = ((before < limit) | (slots < min_blocks)) & (slots < most) & (values > 0)
        return torch.zeros_like(taken).scatter_(-1, order, taken)

    # Its temporaries are in 64 bits.
    return _by_rows(choose, probabilities, limit, most=SLICE // 4)


def fixed_point(share: float) -> int:
    """Returns a share in units of 2^-40."""
    return int(share * (1 << FIXED))


def masses_before(values: Tensor) -> Tensor:
    """Returns the sums of the probabilities before each one, int64, in units of 2^-40."""
    mass = (values.clamp(max=1).double() * (1 << FIXED)).long()
    return mass.cumsum(-1) - mass


def _by_rows(
    choose: Callable[..., Tensor], scores: Tensor, *more: Tensor, most: int = SLICE
) -> Tensor:
    """Applies `choose` to a few rows at a time, as its temporaries are larger than the scores.

    Args:
        most: elements of a few rows.
    """
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (scores.detach(), *more)]
    step = max(1, most // scores.shape[-1])
    parts = [choose(*rows) for rows in zip(*(f.split(step) for f in flat), strict=True)]
    return torch.cat(parts).view(scores.shape)


def _check_rows(name: str, rows: Tensor) -> None:
    check_floats(name, rows)
    if not rows.dim():
        raise ValueError(f"{name} must have shape [..., n], got []")
