"""Sums and maxima of attention probabilities, without the map of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha import _checks
from sparse_fmha._checks import check_choice, check_floats, check_int, check_q_and_k
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import SLICE, ceil_div
from sparse_fmha.selection import score_kernels

REDUCTIONS = ("columns", "diagonals", "blocks_max", "blocks_sum")
GROUPS = ("mean", "max")
KEYS = 1 << 14  # keys converted to fp32 at a time


def score_sums(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    rows: int | None = None,
    reduce: str = "columns",
    causal: bool = False,
    scale: float | None = None,
    group: str | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> Tensor:
    """Sums or maxima of attention probabilities over queries, diagonals or blocks.

        P[i, j] = exp(scale * q_i . k_j - lse_i), 0 if key j is hidden from query i,
        "columns":    C[j] = sum over i of P[i, j],
        "diagonals":  G[s] = sum over i of P[i, p_i - s], with p_i = i + Lkv - Lq,
        "blocks_sum": S[I, J] = sum of P[i, j] over i in block I and j in block J,
        "blocks_max": the largest P[i, j] there.

    Column sums of the last queries are the importance of keys in SnapKV (Li et al. 2024,
    arXiv:2404.14469); MInference (Jiang et al. 2024, arXiv:2407.02490) adds diagonal sums. Block
    maxima are the training target of SeerAttention (Gao et al. 2024, arXiv:2410.13276).

    On GPUs of compute capability 9.0, kernels take fp16 and bf16 tensors with head dims up to 256
    that are a multiple of 8: all "columns", "blocks_sum" and "blocks_max" with blocks of 16, 32, 64
    or 128, and "diagonals" with `rows` up to 128. Scores stay on the chip: besides the result,
    memory is a few times `4 * B * Hq * Lq` bytes, and for diagonals twice the result. One kernel
    finds the denominators, if they are not given, and one reduces the probabilities. Sums are in a
    fixed order.

    Otherwise, probabilities are computed by torch's ops, in slices of query rows of one key head,
    and reduced at once, in fp32. A slice has at most 2^24 scores on the CPU and 2^26 elsewhere, or
    one row (for blocks, one block of rows) of one query head if that is more. So besides the
    result, memory is a small multiple of `4 * max(2^24, Lkv)` bytes; for blocks of
    `4 * max(2^24, block_q * Lkv)`. Several reductions of one call, as patterns make them, run as
    kernels if all of them have one.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`; Hq is a multiple of Hkv.
        lse: `[B, Lq, Hq]`, natural log: the denominators, as attention returns them. A row with
            -inf has probabilities 0. Default: the row's own log-sum-exp over the keys it sees.
        rows: use only the last `rows` queries; Lq if there are fewer. Default: all.
        reduce: one of the four above.
        causal: query i sees key j only if `j <= i + Lkv - Lq`. Needed for "diagonals".
        scale: scale of q.k; default `D**-0.5`.
        group: "mean" or "max" over the query heads of each key head, of what `reduce` gives.
            Default: a result for each query head.
        block_q, block_kv: sizes of the blocks, any. Query blocks begin at the first used query; the
            last blocks may be shorter.

    Returns:
        fp32 `[B, H, Lkv]`, at s >= 0 for "diagonals"; for blocks `[B, H, nQ, nK]`. H is Hkv with
        `group`, otherwise Hq. No gradients. Does not wait for the device.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    (sums,) = reductions(
        q, k, (reduce,), lse=lse, rows=rows, causal=causal, scale=scale, group=group,
        block_q=block_q, block_kv=block_kv,
    )  # fmt: skip
    return sums


@torch.no_grad()
def reductions(
    q: Tensor,
    k: Tensor,
    reduce: Sequence[str],
    *,
    lse: Tensor | None = None,
    rows: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    group: str | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> list[Tensor]:
    """`score_sums` for several reductions of the same probabilities."""
    check_q_and_k(q, k)
    for name in reduce:
        check_choice("reduce", name, REDUCTIONS)
    if group is not None:
        check_choice("group", group, GROUPS)
    _checks.check_flag("causal", causal)
    check_int("block_q", block_q, 1)
    check_int("block_kv", block_kv, 1)
    if "diagonals" in reduce and not causal:
        raise ValueError("causal must be True with reduce 'diagonals', got False")
    _check_lse(lse, q)
    q_len, dim = q.shape[1], q.shape[3]
    used = q_len if rows is None else min(check_int("rows", rows, 1), q_len)
    scale = _checks.finite("scale", scale)
    scale = dim**-0.5 if scale is None else scale
    q = q[:, q_len - used :]
    lse = None if lse is None else lse[:, q_len - used :]
    if score_kernels.take(q, k, reduce, block_q, block_kv):
        results = score_kernels.reduce(q, k, reduce, lse, causal, scale, block_q, block_kv)
    else:
        results = _in_slices(q, k, reduce, lse, causal, scale, block_q, block_kv)
    if group is None:
        return results
    over: Callable[[Tensor], Tensor] = _mean if group == "mean" else _max
    return [over(result.unflatten(1, (k.shape[2], q.shape[2] // k.shape[2]))) for result in results]


def _in_slices(
    q: Tensor,
    k: Tensor,
    reduce: Sequence[str],
    lse: Tensor | None,
    causal: bool,
    scale: float,
    block_q: int,
    block_kv: int,
) -> list[Tensor]:
    """The reductions over all queries of q, by torch's ops."""
    batch, used, heads, _ = q.shape
    kv_len, heads_kv = k.shape[1:3]
    whole = block_q if any(name.startswith("blocks") for name in reduce) else 1
    in_blocks = (ceil_div(used, block_q), ceil_div(kv_len, block_kv))
    results = []
    for name in reduce:
        shape = in_blocks if name.startswith("blocks") else (kv_len,)
        results.append(torch.zeros(batch, heads, *shape, dtype=torch.float32, device=q.device))
    most = SLICE if q.device.type == "cpu" else 4 * SLICE
    members = heads // heads_kv
    size = used * kv_len
    together = max(1, most // max(1, size))  # heads
    step = whole * max(1, most // max(1, whole * kv_len)) if size > most else used
    with without_autocast(q.device):
        for b, head_kv in product(range(batch), range(heads_kv)):
            end = (head_kv + 1) * members
            for head, first in product(
                range(end - members, end, together), range(0, used, max(1, step))
            ):
                own = slice(head, min(head + together, end))
                part = slice(first, min(first + step, used))
                # No query of the slice sees a key after the last query's own.
                seen = min(max(part.stop + kv_len - used, 0), kv_len) if causal else kv_len
                if seen == 0:
                    continue
                scores = _products(q[b, part, own].transpose(0, 1), k[b, :seen, head_kv], scale)
                shift = first + kv_len - used if causal else None
                given = None if lse is None else lse[b, part, own].T
                weights = _probabilities(scores, shift, given)
                for name, result in zip(reduce, results, strict=True):
                    _add(name, result[b, own], weights, first, shift, (block_q, block_kv))
    return results


def _products(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Returns `scale * q k^T` in fp32, `[n, rows, L]`, of queries `[n, rows, D]`, keys `[L, D]`."""
    n, rows, dim = queries.shape
    length = keys.shape[0]
    half = (torch.float16, torch.bfloat16)
    if queries.device.type == "cuda" and queries.dtype in half and keys.dtype == queries.dtype:
        flat = torch.mm(queries.reshape(-1, dim), keys.T, out_dtype=torch.float32)
        return flat.view(n, rows, length).mul_(scale)
    queries = queries.float() * scale
    if length <= KEYS:
        return queries @ keys.float().T
    scores = queries.new_empty(n, rows, length)
    for first in range(0, length, KEYS):
        part = slice(first, first + KEYS)
        scores[..., part] = queries @ keys[part].float().T
    return scores


def _probabilities(scores: Tensor, shift: int | None, lse: Tensor | None) -> Tensor:
    """Returns probabilities of scores `[n, rows, L]`, which are overwritten.

    Args:
        shift: row i sees `j <= i + shift`; None: all.
        lse: `[n, rows]`, or None: over the row.
    """
    rows, length = scores.shape[1:]
    if shift is not None:
        begin = min(max(shift + 1, 0), length)  # the first row sees the keys before it
        row = torch.arange(rows, device=scores.device)[:, None]
        later = torch.arange(begin, length, device=scores.device) > row + shift
        scores[..., begin:].masked_fill_(later, -torch.inf)
    if lse is not None:
        top = lse.to(torch.float32)[..., None]
        scores.sub_(torch.where(top > -torch.inf, top, torch.inf)).exp_()
        return scores
    top = scores.amax(-1, keepdim=True)
    scores.sub_(torch.where(top > -torch.inf, top, 0)).exp_()
    total = scores.sum(-1, keepdim=True)
    return scores.div_(torch.where(total > 0, total, 1))


def _add(
    name: str,
    result: Tensor,
    weights: Tensor,
    first: int,
    shift: int | None,
    blocks: tuple[int, int],
) -> None:
    """Reduces weights `[n, rows, L]` of the rows from `first` into a result of the same heads."""
    rows, length = weights.shape[1:]
    if name == "columns":
        result[..., :length] += weights.sum(1)
    elif name == "diagonals":
        assert shift is not None
        result[..., :length] += _diagonal_sums(weights[:, max(0, -shift) :].contiguous())
    else:
        block_q, block_kv = blocks
        row, over = first // block_q, _max if name == "blocks_max" else _sum
        if length % block_kv:
            weights = pad(weights, (0, -length % block_kv))
        reduced = pad(over(weights.unflatten(2, (-1, block_kv)), -1), (0, 0, 0, -rows % block_q))
        reduced = over(reduced.unflatten(1, (-1, block_q)), 2)
        result[:, row : row + reduced.shape[1], : reduced.shape[2]] = reduced


def _diagonal_sums(weights: Tensor) -> Tensor:
    """Sums weights `[n, rows, L]` to `[n, L]`: at s all `weights[:, i, L - rows + i - s]`."""
    n, rows, length = weights.shape
    base = length - rows  # the first query's own key
    # A stride of one row and one column walks along a diagonal. First the diagonals on which the
    # first query has a key, from key 0 up; then those that begin below it.
    inner = weights.as_strided((n, rows, base + 1), (rows * length, length + 1, 1)).sum(1)
    corner = pad(weights[..., :rows], (rows, 0)).contiguous()
    outer = corner.as_strided((n, rows, rows), (2 * rows * rows, 2 * rows + 1, 1)).sum(1)
    return torch.cat([inner.flip(-1), outer[:, 1:].flip(-1)], -1)


def _mean(x: Tensor, dim: int = 2) -> Tensor:
    return x.mean(dim)


def _max(x: Tensor, dim: int = 2) -> Tensor:
    return x.amax(dim)


def _sum(x: Tensor, dim: int = 2) -> Tensor:
    return x.sum(dim)


def _check_lse(lse: Tensor | None, q: Tensor) -> None:
    if lse is None:
        return
    check_floats("lse", lse, 3, f"{list(q.shape[:-1])}")
    if lse.shape != q.shape[:-1]:
        raise ValueError(f"lse must have shape {list(q.shape[:-1])}, got {list(lse.shape)}")
    if lse.device != q.device:
        raise ValueError(f"lse must be on q's device, {q.device}, got {lse.device}")
