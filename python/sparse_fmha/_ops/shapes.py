"""Output shapes of the ops, for tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div

SKIP_TILE, SKIP_STAGE = 64, 32  # kSkipTile and kSkipStage of planning/skip_bits.h


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    skip_threshold: Tensor | None = None,
    save_skipped: bool = False,
    **others: Any,
) -> list[Tensor]:
    """out `[B, *L, Hq, Dv]`, and lse `[B, *L, Hq]` in fp32, both contiguous.

    With thresholds also the counts of visited and skipped tiles, `[B, Hq, 2]`, and, if they are to
    be saved, the bits of skipped tiles, `[B, Hq, groups, words]` in int32, of size 0 on the CPU.
    """
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    results = [out, q.new_empty(q.shape[:-1], dtype=torch.float32)]
    if skip_threshold is not None:
        results.append(q.new_empty((q.shape[0], q.shape[-2], 2), dtype=torch.int64))
        if save_skipped:
            bits = (0, 0) if q.device.type == "cpu" else _skip_sizes(q, k, v, **others)
            results.append(q.new_empty((q.shape[0], q.shape[-2], *bits), dtype=torch.int32))
    return results


def _skip_sizes(
    q: Tensor, k: Tensor, v: Tensor, window: Sequence[int] | None = None, **others: Any
) -> tuple[int, int]:
    """Groups of 64 queries, and words for the tiles of one: skip_sizes() of planning/skip_bits.h.

    Those of windows depend on boxes that are chosen by all sizes, so there sizes that a compiled
    graph had left open are fixed.
    """
    from sparse_fmha._extension import _C

    if window is None:
        return ceil_div(q.shape[1], 64), ceil_div(_skip_tiles(k, **others), 32)
    filler = (1,) * (6 - q.dim())

    def triple(values: Sequence[int], of_filler: tuple[int, ...] = filler) -> Any:
        return *of_filler, *(int(x) for x in values)

    problem = (
        triple(q.shape[1:-2]),
        triple(window),
        triple(others["stride"]),
        triple(others["dilation"]),
        triple(others["causal"], (0,) * len(filler)),
    )
    extra_k = others.get("extra_k")
    extra = 0 if extra_k is None else int(extra_k.shape[1])
    return _C.tiles.skip_sizes(problem, extra, int(q.shape[-1]), int(v.shape[-1]))


def _skip_tiles(
    k: Tensor,
    indices: Tensor | None = None,
    partial_indices: Tensor | None = None,
    block_kv: int = 0,
    columns: Tensor | None = None,
    range_starts: Tensor | None = None,
    range_size: int = 64,
    **_others: object,
) -> int:
    """The most tiles that 64 queries visit: skip_tiles() of planning/skip_bits.h."""
    if indices is not None:
        partials = 0 if partial_indices is None else partial_indices.shape[-1]
        return ceil_div((indices.shape[-1] + partials) * block_kv, SKIP_STAGE) + 1
    if columns is not None:
        runs = 0 if range_starts is None else range_starts.shape[-1]
        of_runs = runs * (range_size // SKIP_STAGE)
        return of_runs + ceil_div(columns.shape[-1], SKIP_STAGE)
    return ceil_div(k.shape[1], SKIP_TILE)


def packed_attention(
    q: Tensor, cu_q: Tensor, skip_threshold: Tensor | None = None, **_others: object
) -> list[Tensor]:
    """out like q, and lse `[T, Hq]` in fp32; with thresholds also counts `[sequences, Hq, 2]`."""
    results = [q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)]
    if skip_threshold is not None:
        results.append(q.new_empty((cu_q.shape[0] - 1, q.shape[1], 2), dtype=torch.int64))
    return results


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_bias: Tensor | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    need_dbias: bool = True,
    **_others: object,
) -> list[Tensor]:
    """Gradients of q, k, v and any extra tokens.

    `[B, 0]` for a gradient that is not needed, or `[T, 0]` where sequences are packed. With a bias
    of keys also its gradient for each batch entry and query head, in fp32.
    """
    wanted = [(q, need_dq), (k, need_dkv), (v, need_dkv)]
    if extra_k is not None and extra_v is not None:
        wanted += [(extra_k, need_dkv), (extra_v, need_dkv)]
    found = [x.new_empty(x.shape if needed else (x.shape[0], 0)) for x, needed in wanted]
    if key_bias is not None:
        shape = (q.shape[0], q.shape[-2], key_bias.shape[-1]) if need_dbias else (q.shape[0], 0)
        found.append(q.new_empty(shape, dtype=torch.float32))
    return found


def anchor_means(q: Tensor, k: Tensor, block: int, step: int, scale: float) -> Tensor:
    """`[B, Hq, blocks]` in fp32."""
    shape = (q.shape[0], q.shape[2], ceil_div(q.shape[1], block))
    return q.new_empty(shape, dtype=torch.float32)


def anchor_keys(
    q_mean: Tensor, k: Tensor, least: Tensor, block: int, step: int
) -> tuple[Tensor, Tensor]:
    """Bits `[B, Hq, superblocks, words]` and counts, as int32."""
    superblocks = ceil_div(q_mean.shape[2], step)
    words = anchor_words(q_mean.shape[2], block, step)
    shape = (*q_mean.shape[:2], superblocks)
    return k.new_empty((*shape, words), dtype=torch.int32), k.new_empty(shape, dtype=torch.int32)


def anchor_columns(bits: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Columns `[B, Hq, superblocks, width]` and counts."""
    return bits.new_empty((*bits.shape[:3], width)), bits.new_empty(bits.shape[:3])


def score_rows(q: Tensor, parts: int, **_others: object) -> Tensor:
    """`[B, Hq, parts, Lq]` in fp32."""
    return q.new_empty((q.shape[0], q.shape[2], parts, q.shape[1]), dtype=torch.float32)


def score_columns(q: Tensor, k: Tensor, **_others: object) -> Tensor:
    """`[B, Hq, Lkv]` in fp32."""
    return q.new_empty((q.shape[0], q.shape[2], k.shape[1]), dtype=torch.float32)


def score_diagonals(q: Tensor, k: Tensor, **_others: object) -> Tensor:
    """`[B, Hq, 2, Lkv]` in fp32."""
    return q.new_empty((q.shape[0], q.shape[2], 2, k.shape[1]), dtype=torch.float32)


def score_blocks(q: Tensor, k: Tensor, block_q: int, block_kv: int, **_others: object) -> Tensor:
    """`[B, Hq, nQ, nK]` in fp32."""
    blocks = (ceil_div(q.shape[1], block_q), ceil_div(k.shape[1], block_kv))
    return q.new_empty((q.shape[0], q.shape[2], *blocks), dtype=torch.float32)


def anchor_words(blocks: int, block: int, step: int) -> int:
    """Number of 32-bit words: one bit per candidate of the last superblock of `anchor_keys`."""
    return max(0, (ceil_div(blocks, step) - 1) * step - 2) * block // 32
