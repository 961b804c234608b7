"""How important PSA's pairs of blocks are: block maxima of attention between sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha._sizes import CACHED, ceil_div
from sparse_fmha.attention import attention
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.selection import score_kernels
from sparse_fmha.selection.products import key_operand, products_by_key
from sparse_fmha.selection.reductions import score_sums


def sampled_importance(
    sample: Tensor, keys: Tensor, grid: BlockGrid, every: int, scale: float
) -> Tensor:
    """Returns the importance of each pair of blocks, fp32 `[B, Hq, nQ, nK]`.

    Args:
        sample, keys: every `every`-th token of q and k. scale: at least 0.
    """
    rows, columns = grid.shape
    size_q, size_k = grid.block_q // every, grid.block_kv // every
    if score_kernels.take(sample, keys, ("blocks_max",), size_q, size_k):
        found = score_sums(
            sample, _last_seen(sample, keys, grid, every), reduce="blocks_max",
            causal=grid.causal, scale=scale, block_q=size_q, block_kv=size_k,
        )  # fmt: skip
        return pad(found, (0, columns - found.shape[3]))
    lse = _sampled_lse(sample, keys, grid, every, scale)
    operand = key_operand(keys, sample.dtype)

    def importance(part: slice) -> list[Tensor]:
        first, last = (n * size_q for n in (part.start, part.stop))
        own = sample[:, first:last], lse[:, :, first:last]
        return [_importance(*own, operand, grid, part.start, every, scale)]

    one_row = sample.shape[0] * sample.shape[2] * size_q * operand.shape[3]
    parts = block_lists.chunks(rows, one_row, sample.device, CACHED)
    (found,) = block_lists.by_chunks(importance, parts, rows, 2)
    return found


def _last_seen(sample: Tensor, keys: Tensor, grid: BlockGrid, every: int) -> Tensor:
    """Returns the sampled keys up to the last that a sampled query sees, for causal attention,
    which counts from the last key: sampled query i sees key j <= i + shift."""
    shift = (grid.kv_len - grid.q_len) // every
    return keys[:, : max(0, sample.shape[1] + shift)] if grid.causal else keys


def _sampled_lse(sample: Tensor, keys: Tensor, grid: BlockGrid, every: int, scale: float) -> Tensor:
    """Returns the log-sum-exp of each sampled query over the sampled keys it sees, `[B, Hq, n]`."""
    keys = _last_seen(sample, keys, grid, every)
    _, lse = attention(sample, keys, keys, causal=grid.causal, scale=scale, return_lse=True)
    return lse.transpose(1, 2)


def _importance(
    sample: Tensor, lse: Tensor, keys: Tensor, grid: BlockGrid, row: int, every: int, scale: float
) -> Tensor:
    """Returns the largest probability of each pair of blocks of a sample, fp32 `[B, H, n, nK]`.

    The scores are written once and read once, for their maxima over the keys of a block. Queries
    are the last dimension, along which a GPU reduces several numbers at a time.

    Args:
        sample: `[B, n, Hq, D]`, of the queries from block `row` on. lse: `[B, Hq, n]`.
        keys: from `key_operand`. scale: at least 0.
    """
    n, columns = sample.shape[1], keys.shape[3]
    size_q, size_k = grid.block_q // every, grid.block_kv // every
    start = row * grid.block_q + grid.kv_len - grid.q_len
    if grid.causal:  # whole blocks up to the last query; the first one sees all before `ragged`
        last = (start + (n - 1) * every) // every
        columns = min(columns, ceil_div(max(0, last + 1), size_k) * size_k)
        ragged = min(columns, max(0, start // every + 1))
    scores = products_by_key(sample, keys[..., :columns]).unflatten(3, (-1, n))
    if grid.causal:
        at = torch.arange(n, device=sample.device) * every + start
        late = torch.arange(ragged, columns, device=sample.device)[:, None, None] * every
        scores[:, :, ragged:].masked_fill_(late > at, -torch.inf)
    whole = columns // size_k * size_k
    found = scores[:, :, :whole].unflatten(2, (whole // size_k, size_k)).amax(3)
    if whole < columns:
        found = torch.cat([found, scores[:, :, whole:].amax(2, keepdim=True)], 2)
    found = found.permute(0, 1, 3, 4, 2).flatten(1, 2)  # [B, Hq, n, blocks]
    hidden = (found == -torch.inf) | (lse[..., None] == -torch.inf)
    found = (found * scale - lse[..., None]).masked_fill_(hidden, -torch.inf)
    missing = ceil_div(keys.shape[3], size_k) - found.shape[3], -n % size_q
    found = pad(found, (0, missing[0], 0, missing[1]), value=-torch.inf)
    largest: Tensor = found.unflatten(2, (-1, size_q)).amax(3).exp()
    return largest
