"""Training target of SeerAttention's gate: block maxima of the softmax map."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import check_q_and_k
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha.masks.block_grid import BlockGrid

SLICE = 1 << 26  # scores in memory at a time


@torch.no_grad()
def seer_ground_truth(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> Tensor:
    """Returns the row-normalized block maxima of the attention map.

        M[I, J] = max over i in block I, j in block J of softmax(scale * q k^T)[i, j],
        T[I, J] = M[I, J] / sum over J of M[I, J].

    The map is never stored as a whole: it is computed in one pass over slices of query blocks, with
    one product of queries and keys per slice. A slice has at least one query block of the query
    heads of one key head, so memory is at most a small multiple of
    `4 * max(2^26, Hq / Hkv * block_q * Lkv)` bytes. Source: Gao et al. 2024, "SeerAttention",
    arXiv:2410.13276; its blocks are 64x64.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention (after RoPE). k: `[B, Lkv, Hkv, D]`.
        causal: query i sees key j only if `j <= i + Lkv - Lq`.
        scale: scale of q.k; default `D**-0.5`.
        block_q, block_kv: 64 or 128, and 16, 32, 64 or 128.

    Returns:
        fp32 `[B, Hq, nQ, nK]`; each row sums to 1, or is 0 if its queries see no key. No gradients.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    scale = _checks.finite("scale", scale)
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=causal)
    batch, q_len, heads, dim = q.shape
    kv_len, heads_kv = k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    group = heads // heads_kv
    truth = torch.zeros(batch, heads, *grid.shape, dtype=torch.float32, device=q.device)
    step = block_q * max(1, SLICE // max(1, group * block_q * kv_len))
    for b in range(batch):
        for head_kv in range(heads_kv):
            own = slice(head_kv * group, (head_kv + 1) * group)
            for first in range(0, q_len, step):
                last = min(first + step, q_len)
                # No query of the slice sees a key after its last query.
                seen = min(max(last + kv_len - q_len, 0), kv_len) if causal else kv_len
                if seen == 0:
                    continue
                scores = _product(q[b, first:last, own], k[b, :seen, head_kv]).mul_(scale)
                shift = first + kv_len - q_len if causal else None
                maxima = _block_maxima(scores, shift, block_q, block_kv)
                row = first // block_q
                truth[b, own, row : row + maxima.shape[1], : maxima.shape[2]] = maxima
    total = truth.sum(-1, keepdim=True)
    return truth / torch.where(total > 0, total, 1)


def _product(q: Tensor, k: Tensor) -> Tensor:
    """Multiplies q `[n, G, D]` by k `[m, D]` to fp32 `[G, n, m]`, not rounded to their dtype."""
    rows = q.transpose(0, 1).flatten(0, 1)
    with without_autocast(q.device):
        if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
            product = torch.mm(rows, k.to(q.dtype).T, out_dtype=torch.float32)
        else:
            product = rows.float() @ k.float().T
    return product.view(q.shape[1], q.shape[0], k.shape[0])


def _block_maxima(scores: Tensor, shift: int | None, block_q: int, block_kv: int) -> Tensor:
    """Returns block maxima of the softmax of scores `[G, n, m]`, which are overwritten.

    With `shift`, row i sees `j <= i + shift`."""
    rows, columns = scores.shape[1:]
    if shift is not None:
        i, j = (torch.arange(n, device=scores.device) for n in (rows, columns))
        scores.masked_fill_(j > i[:, None] + shift, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    scores.sub_(torch.where(top > -torch.inf, top, 0)).exp_()
    total = scores.sum(-1, keepdim=True)
    pad = torch.nn.functional.pad
    parts = pad(scores, (0, -columns % block_kv)) if columns % block_kv else scores
    maxima: Tensor = parts.unflatten(2, (-1, block_kv)).amax(-1)
    maxima = maxima / torch.where(total > 0, total, 1)
    maxima = pad(maxima, (0, 0, 0, -rows % block_q))
    rows_of_blocks: Tensor = maxima.unflatten(1, (-1, block_q))
    return rows_of_blocks.amax(2)
