"""SeerAttention's gate: a small learned layer that selects blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparse_fmha._checks import (
    check_choice,
    check_int,
    check_number,
    check_positive,
    check_q_and_k,
    plain_ints,
)
from sparse_fmha._sizes import CACHED
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_indices
from sparse_fmha.selection.pooling import POOLS

THRESHOLD = 2e-3


class SeerAttentionGate(nn.Module):
    """The AttnGate of SeerAttention, for prefill.

        Qg = RoPE(W_q . pools of q over blocks), Kg = RoPE(W_k . pools of k over blocks),
        A = softmax(Qg Kg^T / sqrt(gate_dim)) over the key blocks that causality allows.

    Pools are concatenated along the head dim. RoPE rotates block n by the position of its first
    token, with (d, d + gate_dim / 2) as pairs. With one pool of q and `gate_dim == head_dim` (the
    default), there is no W_q, and W_k has a matrix for each query head; otherwise W_q has one for
    each query head and W_k one for each key head. Source: Gao et al. 2024, "SeerAttention: Learning
    Intrinsic Sparse Attention in Your LLMs", arXiv:2410.13276; defaults as published: blocks of 64,
    gate dim 128, mean of q; max, min and mean of k. To train, minimize the KL divergence between
    the softmax of `forward` and `seer_ground_truth`, the target.

    Args:
        heads, heads_kv, head_dim: sizes of q and k.
        gate_dim: even.
        block: tokens per query block and per key block: 64 or 128.
        q_pools, k_pools: one or more of "mean", "max", "min".
        rope_base: base of the model's RoPE.
        inv_freq: `[gate_dim / 2]`, replaces `rope_base ** -(2 i / gate_dim)`.
        device, dtype: device and dtype of the weights; None: torch's default.

    Attributes:
        weight_q: `[heads, len(q_pools) * head_dim, gate_dim]` or None.
        weight_k: `[heads or heads_kv, len(k_pools) * head_dim, gate_dim]`.

    Raises:
        ValueError, TypeError: a size or pool is not allowed.
    """

    inv_freq: Tensor

    @plain_ints
    def __init__(
        self,
        heads: int,
        heads_kv: int,
        head_dim: int,
        *,
        gate_dim: int = 128,
        block: int = 64,
        q_pools: Sequence[str] = ("mean",),
        k_pools: Sequence[str] = ("max", "min", "mean"),
        rope_base: float = 10000.0,
        inv_freq: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_gate_sizes(heads, heads_kv, head_dim, gate_dim)
        BlockGrid(0, 0, block, block)  # checks it
        for name, pools in (("q_pools", q_pools), ("k_pools", k_pools)):
            if not pools:
                raise ValueError(f"{name} must have at least one entry, got none")
            for pool in pools:
                check_choice(name, pool, POOLS)
        self.heads, self.heads_kv, self.head_dim = heads, heads_kv, head_dim
        self.gate_dim, self.block = gate_dim, block
        self.q_pools, self.k_pools = tuple(q_pools), tuple(k_pools)
        project_q = len(q_pools) > 1 or gate_dim != head_dim
        shape_k = (heads_kv if project_q else heads, len(k_pools) * head_dim, gate_dim)
        shape_q = (heads, len(q_pools) * head_dim, gate_dim)
        self.weight_k = nn.Parameter(torch.empty(shape_k, device=device, dtype=dtype))
        self.weight_q = (
            nn.Parameter(torch.empty(shape_q, device=device, dtype=dtype)) if project_q else None
        )
        rope_base = check_positive("rope_base", rope_base)
        if inv_freq is None:
            half = torch.arange(0, gate_dim, 2, dtype=torch.float32, device=device)
            inv_freq = rope_base ** -(half / gate_dim)
        elif inv_freq.shape != (gate_dim // 2,):
            raise ValueError(
                f"inv_freq must have shape [{gate_dim // 2}], got {list(inv_freq.shape)}"
            )
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes weights from a normal distribution with variance 1 / (inputs per head)."""
        for weight in (self.weight_q, self.weight_k):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(
        self, q: Tensor, k: Tensor, *, causal: bool = True, softmax: bool = False
    ) -> Tensor:
        """Returns the scores of the blocks.

        Args:
            q: `[B, Lq, heads, head_dim]` before RoPE. k: `[B, Lkv, heads_kv, head_dim]` before
                RoPE.
            causal: -inf (with `softmax` 0) for blocks entirely above the diagonal.
            softmax: return A instead of its logits.

        Returns:
            fp32 `[B, heads, nQ, nK]`.
        """
        gate_q, gate_k, grid = self._gates(q, k, causal)
        allowed = grid.reachable() if causal else None
        return pooled_scores(gate_q, gate_k, allowed=allowed, softmax=softmax)

    @torch.no_grad()
    def mask(
        self,
        q: Tensor,
        k: Tensor,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        nz_ratio: float | None = None,
        dense_rows: int = 2,
        causal: bool = True,
    ) -> BlockMask:
        """Returns the mask that the gate selects, in blocks of `block` queries and keys.

        Args:
            q, k: before RoPE, as in `forward`.
            threshold: take blocks with `A > threshold`. This is the default, with 2e-3 (published:
                5e-4 to 5e-3).
            top_k: take the k largest of each row instead.
            nz_ratio: take a share r of the causal blocks instead, by a top_k of
                `max(1, int((1 - sqrt(1 - r)) * nK))`.
            dense_rows: how many of the last query blocks see everything. No diagonal is forced.
            causal: as in `BlockMask`.

        Returns:
            A mask for each batch entry and query head, built without waiting for the device. Scores
            are computed a few rows of blocks at a time.

        Raises:
            ValueError: more than one of threshold, top_k and nz_ratio is given, or a number is not
                allowed.
        """
        given = [x for x in (threshold, top_k, nz_ratio) if x is not None]
        if len(given) > 1:
            raise ValueError(
                "at most one of threshold, top_k and nz_ratio must be given, got "
                f"{threshold}, {top_k} and {nz_ratio}"
            )
        check_int("dense_rows", dense_rows)
        gate_q, gate_k, grid = self._gates(q, k, causal)
        rows, columns = grid.shape
        if nz_ratio is not None:
            share = 1 - math.sqrt(1 - check_number("nz_ratio", nz_ratio, 0, 1))
            top_k = max(1, int(share * columns))
        if top_k is not None:
            top_k = check_int("top_k", top_k, 1)
        limit = THRESHOLD if threshold is None else check_number("threshold", threshold, 0, 1)
        sizes = (grid.q_len, grid.kv_len, self.block, self.block)
        number = torch.arange(columns, dtype=torch.int32, device=q.device)
        ends = block_lists.reached(*sizes, causal, q.device)

        def opened(part: slice) -> tuple[Tensor, Tensor]:
            allowed = number < ends[part, None]
            if top_k is None:
                shares = pooled_scores(gate_q[:, part], gate_k, allowed=allowed, softmax=True)
                counts, indices = block_lists.list_blocks(shares > limit, None, ends[part])
            else:
                seen = (
                    columns
                    if len(parts) <= 1
                    else block_lists.reached_before(part.stop, *sizes, causal)
                )
                scores = pooled_scores(gate_q[:, part], gate_k[:, :seen], allowed=allowed[:, :seen])
                counts, indices = top_k_indices(scores, top_k)
                behind = columns - indices.shape[-1]
                indices = pad(indices, (0, behind), value=block_lists.ABSENT)
            if part.stop > rows - dense_rows:
                dense = torch.arange(part.start, part.stop, device=q.device) >= rows - dense_rows
                counts = torch.where(dense, ends[part].int(), counts)
                every = torch.where(allowed, number, block_lists.ABSENT)
                indices = torch.where(dense[:, None], every, indices)
            return counts, indices

        parts = block_lists.chunks(rows, q.shape[0] * self.heads * columns, q.device, CACHED)
        counts, indices = block_lists.by_chunks(opened, parts, rows, 2)
        return BlockMask(counts, indices, *sizes, causal=causal)

    def _gates(self, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor, BlockGrid]:
        """Returns Qg, Kg and the grid of blocks."""
        check_q_and_k(q, k)
        for name, x, heads in (("q", q, self.heads), ("k", k, self.heads_kv)):
            if x.shape[2:] != (heads, self.head_dim):
                raise ValueError(
                    f"{name} must have {heads} heads of {self.head_dim}, got shape {list(x.shape)}"
                )
        grid = BlockGrid.of(q, k, self.block, self.block, causal=causal)
        gate_q, gate_k = self._pool(q, self.q_pools), self._pool(k, self.k_pools)
        if self.weight_q is None:
            gate_k = gate_k.repeat_interleave(self.heads // self.heads_kv, 2)
        else:
            gate_q = _project(gate_q, self.weight_q)
        gate_k = _project(gate_k, self.weight_k)
        gate_q = self._rotate(gate_q, grid.kv_len - grid.q_len)
        return gate_q, self._rotate(gate_k, 0), grid

    def _pool(self, x: Tensor, pools: Sequence[str]) -> Tensor:
        return torch.cat([pool_blocks(x, self.block, pool) for pool in pools], -1)

    def _rotate(self, x: Tensor, first: int) -> Tensor:
        """Applies RoPE to blocks `[B, n, H, gate_dim]` at positions first, first + block, ..."""
        position = torch.arange(x.shape[1], device=x.device) * self.block + first
        angle = position[:, None, None] * self.inv_freq.float()
        low, high = x.float().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def check_gate_sizes(heads: int, heads_kv: int, head_dim: int, gate_dim: int) -> None:
    """Raises ValueError or TypeError if a gate, for prompts or decoding, cannot have the sizes."""
    sizes = {"heads": heads, "heads_kv": heads_kv, "head_dim": head_dim, "gate_dim": gate_dim}
    for name, value in sizes.items():
        check_int(name, value, 1)
    if heads % heads_kv:
        raise ValueError(f"heads must be a multiple of heads_kv = {heads_kv}, got {heads}")
    if gate_dim % 2:
        raise ValueError(f"gate_dim must be even, got {gate_dim}")


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies `[B, n, H, in]` by a matrix for each head, `[H, in, out]`."""
    return torch.einsum("bnhi,hio->bnho", x.to(weight.dtype), weight)
