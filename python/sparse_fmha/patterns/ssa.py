"""SSA, sparse sparse attention: blocks for each token, and both streams of its training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, smooth_l1_loss

from sparse_fmha._checks import check_device, check_floats, check_int, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_blocks


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
        a list. All `Hq * Lq * Lkv / block` scores are computed, a few query blocks at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_int("blocks", blocks, 1)
    grid = BlockGrid.of(q, k, block_q, block, causal=True)
    rows, columns = grid.shape
    batch, q_len, heads, _ = q.shape
    heads_kv = k.shape[2]
    if width is None:
        width = blocks * block_q
    width = min(check_int("width", width), columns)
    keys = pool_blocks(k.detach(), block)

    def lists(part: slice) -> list[Tensor]:
        tokens = slice(part.start * block_q, min(part.stop * block_q, q_len))
        at = torch.arange(tokens.start, tokens.stop, device=q.device) + (grid.kv_len - q_len)
        scores = pooled_scores(q[:, tokens].detach(), keys, scale=scale)
        chosen = _chosen(scores.unflatten(1, (heads_kv, heads // heads_kv)), at, block, blocks)
        return _lists(chosen, block_q, min(blocks, columns), width, block // 8)

    parts = block_lists.chunks(rows, batch * heads * block_q * columns, q.device, 1 << 20)
    made = block_lists.by_chunks(lists, parts, rows, 2)
    if heads_kv > 1:
        made = [table.repeat_interleave(heads // heads_kv, 1) for table in made]
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


def _chosen(scores: Tensor, at: Tensor, block: int, blocks: int) -> Tensor:
    """Returns each token's blocks, bool `[B, Hkv, n, nK]`.

    Args:
        scores: `[B, Hkv, G, n, nK]`, overwritten. at: int64 `[n]`, positions of the tokens.
    """
    number = torch.arange(scores.shape[-1], device=scores.device)
    own = at.div(block, rounding_mode="floor")[:, None]
    complete = (number + 1) * block <= at[:, None] + 1
    lse = scores.masked_fill(~complete, -torch.inf).logsumexp(-1, keepdim=True)
    weights = scores.sub_(lse.nan_to_num(0, 0, 0)).exp_().sum(2)
    weights = weights.masked_fill_(number >= own, -torch.inf).masked_fill_(number == own, torch.inf)
    return top_k_blocks(weights, blocks)


def _lists(
    chosen: Tensor, block_q: int, full_width: int, width: int, row_bytes: int
) -> list[Tensor]:
    """Returns lists of the blocks that all, or some, tokens of each query block chose, with bits.

    Args:
        chosen: bool `[B, H, n, nK]`; n tokens, from the first of a query block on.
    """
    n = chosen.shape[2]
    rows = ceil_div(n, block_q)
    chosen = pad(chosen, (0, 0, 0, rows * block_q - n)).unflatten(2, (rows, block_q))
    tokens = torch.arange(rows, device=chosen.device) * block_q
    tokens = (n - tokens).clamp(max=block_q)[:, None]
    times = chosen.sum(3, dtype=torch.int32)
    whole = times == tokens
    counts, indices = block_lists.list_blocks(whole, full_width)
    partial_counts, partial_indices = block_lists.list_blocks((times > 0) & ~whole, width)
    # Past the counts, bits of block 0 are read, which are not used.
    slots = partial_indices.clamp(min=0).long()[..., None, :].expand(-1, -1, -1, block_q, -1)
    seen = chosen.gather(-1, slots).transpose(-1, -2)
    bits = seen.to(torch.uint8).mul_(255)[..., None].expand(*seen.shape, row_bytes)
    return [counts, indices, partial_counts, partial_indices, bits]
