"""SSA, sparse sparse attention: blocks for each token, and both streams of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, smooth_l1_loss

from sparse_fmha._checks import (
    check_device,
    check_floats,
    check_int,
    check_qkv_of_one_dim,
    finite,
    plain_ints,
)
from sparse_fmha._ops import ssa_choices
from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_lists import ABSENT
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.selection import pool_blocks

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class SSAStreams(NamedTuple):
    """Both attentions of a layer in training, and how far apart they are."""

    full: Tensor  # [B, L, Hq, D], causal attention to all keys
    sparse: Tensor  # [B, L, Hq, D], attention under the mask
    alignment: Tensor  # scalar, see `ssa_alignment`


@plain_ints
def ssa(
    q: Tensor,
    k: Tensor,
    *,
    blocks: int = 16,
    block: int = 16,
    scale: float | None = None,
    block_q: int = 64,
    width: int | None = None,
) -> BlockMask:
    """Returns the causal mask of SSA, sparse sparse attention: blocks for each token and key head.

        s[i, h, J] = scale * q_{i, h} . mean of k over block J,
        w[i, J]    = sum over the heads h of a group of exp(s[i, h, J] - lse[i, h]), J before i's
                     own block, with lse over the blocks that end at i or before;
        token i sees its own block, up to itself, and the `blocks - 1` others with the largest w.

    Source: Shen et al. 2025, "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention
    Outputs in Feature Space", arXiv:2511.20102; 16 blocks of 16 tokens as in the paper. Selection
    as in the Native Sparse Attention kernels that its code calls, without their window and
    compressed branches. Ties take the first block; neither says which.

    The kernels share a list among `block_q` queries. So a list is the union of what its tokens
    chose, and bitmasks restore each token's own choice. Cost follows the unions, which are short
    where neighboring tokens choose alike.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`.
        blocks: key blocks of each token, including its own; at least 1.
        block: tokens in a key block: 16, 32, 64 or 128.
        scale: scale of q.k; default `D**-0.5`.
        block_q: queries that share a list: 64 or 128.
        width: capacity of the lists of blocks that only some tokens of a list chose; a longer list
            loses its last blocks. Default: the most there can be, `block_q * blocks` or all blocks.

    Returns:
        A mask with lists for each batch entry and query head (one for all with one key head), built
        without waiting for the device. Bitmasks take `block_q * block / 8` bytes for each entry of
        a list; `ssa_attention` has them once for each key head. One kernel chooses; it computes
        the scores of all tokens with the blocks before them and holds none.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
        RuntimeError: the head dim is not a multiple of 8 up to 256, or on CUDA the dtype is fp64,
            a key head has more than 16 query heads, or `blocks` is above 513.
    """
    mask = _mask(q, k, blocks, block, scale, block_q, width)
    heads, heads_kv = q.shape[2], k.shape[2]
    if heads_kv == 1:
        return mask
    return _of_heads(mask, lambda table: table.repeat_interleave(heads // heads_kv, 1))


@plain_ints
def ssa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: int = 16,
    block: int = 16,
    scale: float | None = None,
    block_q: int = 64,
    width: int | None = None,
) -> Tensor:
    """Computes SSA's attention, with its choice: `block_sparse_attention` under the mask of `ssa`.

    The query heads of a key head have the same lists. Here they have them once: key heads take the
    place of batch entries, which copies nothing with one batch entry. So bitmasks take
    `Hkv / Hq` of the memory of those of `ssa`. Differentiable in q, k and v; the choice is not.

    Args:
        q: `[B, Lq, Hq, D]`. k, v: `[B, Lkv, Hkv, D]`; dtypes and strides as in `attention`.
        blocks, block, scale, block_q, width: as in `ssa`.

    Returns:
        `[B, Lq, Hq, D]` in q's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ssa` and `block_sparse_attention`.
    """
    check_qkv_of_one_dim(q, k, v, axes=(1,))
    mask = _mask(q, k, blocks, block, scale, block_q, width)
    batch, heads_kv = q.shape[0], k.shape[2]
    q, k, v = (
        x.unflatten(2, (heads_kv, x.shape[2] // heads_kv)).transpose(1, 2).flatten(0, 1)
        for x in (q, k, v)
    )
    mask = _of_heads(mask, lambda table: table.flatten(0, 1)[:, None])
    out = block_sparse_attention(q, k, v, mask, scale=scale)
    joined: Tensor = out.unflatten(0, (batch, heads_kv)).transpose(1, 2).flatten(2, 3)
    return joined


def ssa_streams(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, scale: float | None = None
) -> SSAStreams:
    """Computes both attentions of a layer in training, and their alignment loss.

    In each step the model takes one stream in all layers, each with probability 1/2, and adds the
    mean of the layers' alignment losses times 10 to its own loss, as in the released code. A model
    that gates the outputs of heads gates both and calls `ssa_alignment` itself. Gradients reach q,
    k and v; the choice of blocks has none.

    Args:
        q: `[B, L, Hq, D]`. k, v: `[B, L, Hkv, D]`, as in `attention`.
        mask: from `ssa`.
        scale: scale of q.k; default `D**-0.5`.

    Raises:
        ValueError, TypeError, RuntimeError: as in `block_sparse_attention`.
    """
    full = attention(q, k, v, causal=True, scale=scale)
    sparse = block_sparse_attention(q, k, v, mask, scale=scale)
    return SSAStreams(full, sparse, ssa_alignment(full, sparse))


def ssa_alignment(full: Tensor, sparse: Tensor) -> Tensor:
    """Returns the mean smooth L1 distance of two outputs, pulling each to the other.

        l(full, sg(sparse)) + l(sg(full), sparse), sg stops the gradient, l is quadratic below 1.

    Args:
        full, sparse: tensors of one shape.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes or devices differ.
        TypeError: not floating point tensors.
    """
    check_floats("full", full)
    check_floats("sparse", sparse)
    check_device("sparse", sparse, full.device)
    if full.shape != sparse.shape:
        raise ValueError(
            f"sparse must have the shape of full, {list(full.shape)}, got {list(sparse.shape)}"
        )
    return smooth_l1_loss(full, sparse.detach()) + smooth_l1_loss(sparse, full.detach())


def _mask(
    q: Tensor,
    k: Tensor,
    blocks: int,
    block: int,
    scale: float | None,
    block_q: int,
    width: int | None,
) -> BlockMask:
    """Returns the mask of `ssa` with a list for each key head in place of each query head."""
    check_int("blocks", blocks, 1)
    scale = finite("scale", scale)
    grid = BlockGrid.of(q, k, block_q, block, causal=True)
    rows, columns = grid.shape
    batch, q_len = q.shape[:2]
    heads_kv = k.shape[2]
    if width is None:
        width = blocks * block_q
    width = min(check_int("width", width), columns)
    few, shift = min(blocks - 1, columns), grid.kv_len - q_len
    dtype = torch.promote_types(q.dtype, k.dtype)
    means = pool_blocks(k.detach(), block)
    chosen = ssa_choices.choices(
        q.detach().to(dtype),
        torch.stack(_parts(means, dtype)),
        block=block,
        at=shift,
        few=few,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )
    chosen = pad(chosen, (0, 0, 0, rows * block_q - q_len), value=ABSENT)
    chosen = chosen.unflatten(2, (rows, block_q))

    def lists(part: slice) -> list[Tensor]:
        own = chosen[:, :, part]
        first = torch.arange(part.start, part.stop, device=q.device) * block_q
        tokens = (q_len - first).clamp(max=block_q)
        return _lists(own, tokens, columns, (min(blocks, columns), width), block // 8)

    row = batch * heads_kv * block_q * max(few + 1, width)
    made = block_lists.by_chunks(lists, block_lists.chunks(rows, row, q.device, 1 << 20), rows, 2)
    counts, indices, partial_counts, partial_indices, bits = made
    return BlockMask(
        counts,
        indices,
        *(grid.q_len, grid.kv_len, block_q, block),
        partial_counts=partial_counts,
        partial_indices=partial_indices,
        partial_bits=bits,
        causal=True,
    )


def _of_heads(mask: BlockMask, change: Callable[[Tensor], Tensor]) -> BlockMask:
    """Returns the mask with its tables `[B, Hkv, ...]` changed."""
    assert mask.partial_counts is not None
    assert mask.partial_indices is not None
    assert mask.partial_bits is not None
    return BlockMask(
        change(mask.counts),
        change(mask.indices),
        *(mask.q_len, mask.kv_len, mask.block_q, mask.block_kv),
        partial_counts=change(mask.partial_counts),
        partial_indices=change(mask.partial_indices),
        partial_bits=change(mask.partial_bits),
        causal=True,
    )


def _parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Returns tensors of a dtype whose sum is x (fp32), in 16 bits to 2**-17 of each number."""
    high = x.to(dtype)
    return [high, (x - high).to(dtype)] if dtype.itemsize == 2 else [high]


def _lists(
    chosen: Tensor, tokens: Tensor, columns: int, widths: tuple[int, int], row_bytes: int
) -> list[Tensor]:
    """Returns lists of the blocks that all, or some, tokens of each query block chose, with bits.

    Args:
        chosen: int32 `[B, H, rows, block_q, k]`, blocks of each token, each once; -1: none.
        tokens: int64 `[rows]`, how many tokens a query block has.
        columns: key blocks. widths: of the lists of blocks that all tokens chose, and that some.
        row_bytes: bytes of a row of a block's bits, 2 to 16.
    """
    batch, heads, rows, block_q, k = chosen.shape
    full_width, width = widths
    flat = chosen.masked_fill(chosen == ABSENT, columns).flatten(3)
    blocks, order = flat.view(batch * heads, rows, block_q * k).sort(-1)
    start, end = (
        torch.searchsorted(blocks, blocks, right=right, out_int32=True) for right in (False, True)
    )
    there = blocks < columns
    whole = end - start == tokens[:, None]
    first = there & (start == torch.arange(block_q * k, device=chosen.device))
    full = block_lists.list_kept(blocks, first & whole, batch * heads, rows, full_width)
    some = first & ~whole
    partial = block_lists.list_kept(blocks, some, batch * heads, rows, width)
    # A word for each row of a listed block: all bits where the token chose the block. One more
    # word takes what is not listed.
    slot = some.cumsum(-1, dtype=torch.int32) - 1
    listed = there & ~whole & (slot < width)
    lists = torch.arange(batch * heads * rows, device=chosen.device).view(-1, rows, 1)
    words = batch * heads * rows * width * block_q
    place = (lists * width + slot) * block_q + order.div(k, rounding_mode="floor")
    kind = WORDS[min(row_bytes, 8)]
    bits = torch.zeros(words + 1, dtype=kind, device=chosen.device)
    bits.scatter_(0, place.masked_fill_(~listed, words).flatten(), -1)
    rows_of_bits = (
        bits[:words].view(torch.uint8).view(batch, heads, rows, width, block_q, min(row_bytes, 8))
    )
    if row_bytes > 8:
        rows_of_bits = rows_of_bits.repeat(1, 1, 1, 1, 1, row_bytes // 8)
    made = [table.unflatten(0, (batch, heads)) for table in (*full, *partial)]
    return [*made, rows_of_bits]
