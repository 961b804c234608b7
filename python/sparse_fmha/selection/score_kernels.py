"""Reductions of scores by the kernels of Hopper (`sm90/scores`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._ops import scores
from sparse_fmha._sizes import ceil_div

BLOCKS = (16, 32, 64, 128)
BLOCKS_OF = {"blocks_max": "maxima", "blocks_sum": "sums"}
MOST_TOKENS = 1 << 29
DIAGONAL_ROWS = 128  # the most queries of diagonal sums
TILE = 128  # rows of a streamed tile
HELD = 256  # rows that a thread block holds; of head dim 256, 128
WANTED = 264  # thread blocks, two for each multiprocessor
LEAST = 8  # tiles of keys for a thread block


def take(q: Tensor, k: Tensor, names: Sequence[str], block_q: int, block_kv: int) -> bool:
    """Whether there are kernels for all of these reductions."""
    if "diagonals" in names and q.shape[1] > DIAGONAL_ROWS:
        return False
    blocks = any(name in BLOCKS_OF for name in names)
    if blocks and not (block_q in BLOCKS and block_kv in BLOCKS):
        return False
    dim = q.shape[3]
    if q.dtype != k.dtype or k.device != q.device or dim % 8 or not (q.numel() and k.numel()):
        return False
    return max(q.shape[1], k.shape[1]) <= MOST_TOKENS and dim <= largest_head_dim(q.device, q.dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def largest_head_dim(device: torch.device, dtype: torch.dtype) -> int:
    """Of the kernels for tensors of this dtype on this device; 0 if there are none."""
    if device.type != "cuda":
        return 0
    try:
        from sparse_fmha._extension import _C
    except ImportError:  # the ops work without it, but do not say what was built
        return 0
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    arch = _C.arch_override() or ("sm90" if hopper else None)
    name = str(dtype).removeprefix("torch.")
    rows = _C.score_kernel_table()
    return max(
        (row["head_dim"] for row in rows if row["arch"] == arch and row["dtype"] == name), default=0
    )


def reduce(
    q: Tensor,
    k: Tensor,
    names: Sequence[str],
    lse: Tensor | None,
    causal: bool,
    scale: float,
    block_q: int,
    block_kv: int,
) -> list[Tensor]:
    """The reductions over all queries `[B, Lq, Hq, D]`, with lse `[B, Lq, Hq]` or their own."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if lse is None:
        lse = row_lse(q, k, causal, scale)
    else:
        lse = lse.to(torch.float32).transpose(1, 2).contiguous()
    results = []
    for name in names:
        if name == "columns":
            results.append(scores.columns(q, k, lse, causal, scale))
        elif name == "diagonals":
            results.append(scores.diagonals(q, k, lse, scale).sum(2))
        else:
            of = BLOCKS_OF[name]
            results.append(scores.blocks(of, q, k, lse, causal, block_q, block_kv, scale))
    return results


def row_lse(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """The log-sum-exp of each query over the keys it sees, `[B, Hq, Lq]`.

    Where there are few queries, several thread blocks share the keys of each.
    """
    blocks = q.shape[0] * q.shape[2] * ceil_div(q.shape[1], HELD)
    parts = max(1, min(WANTED // blocks, ceil_div(k.shape[1], TILE) // LEAST))
    found = scores.rows(q, k, causal, parts, scale)
    return found[:, :, 0] if parts == 1 else found.logsumexp(2)
