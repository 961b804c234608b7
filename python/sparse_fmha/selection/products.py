"""Products of queries and keys in fp32, on a GPU's 16-bit matrix units where nothing is lost.

A CPU multiplies fp32, and so do other devices if q or k has other dtypes than these. Two operands
of one 16-bit dtype are multiplied as they are. bf16 queries meet fp32 keys as three bf16 parts of
the keys, whose 3 * 8 bits are fp32's 24. Sums are in fp32 either way, so results differ by the
order of summation alone. A GPU multiplies fp32 at about a tenth of the rate of 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._ops.autocast import without_autocast

HALVES = (torch.float16, torch.bfloat16)


def key_operand(k: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns keys `[B, L, Hkv, D]` as `products_by_key` with queries of a dtype takes them.

    Returns:
        `[B, Hkv, D, L]` in fp32 or in 16 bits, or three bf16 parts `[B, Hkv, 3 D, L]`.
    """
    keys = k.permute(0, 2, 3, 1)
    if k.device.type != "cpu":
        if k.dtype == dtype and dtype in HALVES:
            return keys
        if (k.dtype, dtype) == (torch.float32, torch.bfloat16):
            return torch.cat(bf16_parts(keys), 2)
    return keys.float()


def products_by_key(q: Tensor, keys: Tensor) -> Tensor:
    """Returns `k . q` for each query head, fp32 `[B, Hkv, L, Hq / Hkv * Lq]`.

    Args:
        q: `[B, Lq, Hq, D]`. keys: from `key_operand` with q's dtype, or some of its last dimension.
    """
    rows, columns = _operands(q, keys)
    return fp32_product(columns.mT, rows.mT)


def _operands(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors of the products, queries `[B, Hkv, Hq / Hkv * Lq, D]` first."""
    batch, _, heads, dim = q.shape
    heads_kv = keys.shape[1]
    grouped: Tensor = q.unflatten(2, (heads_kv, heads // heads_kv)).permute(0, 2, 3, 1, 4)
    if keys.dtype == torch.float32:
        return grouped.float().flatten(2, 3), keys
    grouped = grouped.repeat(1, 1, 1, 1, keys.shape[2] // dim)
    return grouped.view(batch, heads_kv, -1, keys.shape[2]), keys


def fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left @ right` in fp32, of `[..., n, d]` and `[..., d, m]` with one leading shape."""
    with without_autocast(left.device):
        if left.device.type == "cpu" or left.dtype != right.dtype or left.dtype not in HALVES:
            return left.float() @ right.float()
        shape = *left.shape[:-1], right.shape[-1]
        pair = left.flatten(0, -3), right.flatten(0, -3)
        found: Tensor = torch.bmm(*pair, out_dtype=torch.float32)
    return found.view(shape)


def bf16_parts(x: Tensor) -> list[Tensor]:
    """Returns three bf16 tensors whose sum is x (fp32), but for what is below bf16's smallest."""
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return parts
