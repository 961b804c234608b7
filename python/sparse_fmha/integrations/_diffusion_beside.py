"""Attention over the grid beside plain tokens, which each batch entry sees all or some of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.integrations._diffusion_layout import Layout, Runs, Seen
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.merge import merge_into_first
from sparse_fmha.patterns import CubeOrder


def by_runs(seen: Seen, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Calls `compute(runs, *tensors)` for the batch, or per entry if its entries see different
    tokens."""
    if isinstance(seen, Tensor):
        raise TypeError("seen must be runs for this method, got a tensor")
    if len(set(seen)) == 1:
        return compute(seen[0], *tensors)
    rows = [compute(runs, *(x[i : i + 1] for x in tensors)) for i, runs in enumerate(seen)]
    return torch.cat(rows)


def beside(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    plain_k: Tensor,
    plain_v: Tensor,
    layout: Layout,
    seen: Seen,
    scale: float | None,
) -> Tensor:
    """Adds the plain tokens that are seen to attention over the grid, which it may overwrite;
    merging is exact."""
    if isinstance(seen, Tensor):
        if seen.is_floating_point():
            bias = seen[:, None]
            plain = attention(q, plain_k, plain_v, scale=scale, key_bias=bias, return_lse=True)
        else:
            mask = key_mask(seen, q.shape[1])
            plain = block_sparse_attention(q, plain_k, plain_v, mask, scale=scale, return_lse=True)
        return merge_into_first(*zip((out, lse), plain, strict=True))[0]

    def merged(runs: Runs, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not runs:
            return out
        k, v = layout.visible(k, runs), layout.visible(v, runs)
        plain = attention(q, k, v, scale=scale, return_lse=True)
        return merge_into_first(*zip((out, lse), plain, strict=True))[0]

    return by_runs(seen, merged, out, lse, q, plain_k, plain_v)


def key_mask(visible: Tensor, q_len: int, block_q: int = 128, block_kv: int = 64) -> BlockMask:
    """The mask in which all queries see the keys of bool `[B, keys]`, as partial blocks; its shapes
    do not depend on them."""
    batch, keys = visible.shape
    rows, columns = ceil_div(q_len, block_q), ceil_div(keys, block_kv)
    device = visible.device
    padded = torch.nn.functional.pad(visible, (0, columns * block_kv - keys))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=device)
    octets = (padded.view(batch, columns, -1, 8) * powers).sum(-1, dtype=torch.uint8)
    none = torch.zeros(1, 1, rows, 1, dtype=torch.int32, device=device)
    listed = torch.arange(columns, dtype=torch.int32, device=device).expand(batch, 1, rows, -1)
    bits = octets[:, None, None, :, None].expand(-1, 1, rows, -1, block_q, -1)
    # A row of the last block that is no query may have bits set, as it is never read.
    return BlockMask(
        none[..., 0].expand(batch, -1, -1).contiguous(),
        none.expand(batch, -1, -1, -1).contiguous(),
        q_len,
        keys,
        block_q,
        block_kv,
        partial_counts=torch.full_like(listed[..., 0], columns),
        partial_indices=listed.contiguous(),
        partial_bits=bits.contiguous(),
    )


def under_mask(
    mask_of: Callable[[Tensor, Tensor], BlockMask],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    seen: Seen,
    scale: float | None,
    order: CubeOrder | None = None,
) -> Tensor:
    """The output rows of the grid's tokens under a mask of the grid, beside the plain tokens.

    Args:
        mask_of: makes it from q and k of the grid.
        order: of the mask's tokens.
    """
    q = layout.queries.split(q)[0]
    (k, plain_k), (v, plain_v) = layout.split(k), layout.split(v)
    out, lse = _on_grid(mask_of(q, k), q, k, v, scale, order)
    if not layout.plain:
        return out
    lse = lse if order is None else order.undo(lse)
    return beside(out, lse, q, plain_k, plain_v, layout, seen, scale)


def _on_grid(
    mask: BlockMask, q: Tensor, k: Tensor, v: Tensor, scale: float | None, order: CubeOrder | None
) -> tuple[Tensor, Tensor]:
    """Returns out of the grid's tokens, and their lse in the mask's order."""
    if order is None:
        return block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True)
    out, lse = block_sparse_attention(
        order.permute(q), order.permute(k), order.permute(v), mask, scale=scale, return_lse=True
    )
    return order.undo(out), lse
