"""SeerAttention-R's gate: a small learned layer that selects blocks of a cache for one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from sparse_fmha._checks import (
    check_device,
    check_floats,
    check_head_dim,
    check_instance,
    check_int,
    check_number,
    check_numbers,
    check_positive,
    check_shape,
    plain_ints,
)
from sparse_fmha._ops import quest_pages
from sparse_fmha._sizes import ceil_div
from sparse_fmha.patterns.seer_attention import check_gate_sizes

BLOCKS = (16, 32, 64, 128)  # of decode_attention
POOLS = 3  # max, min and mean


class SeerDecodeGate(nn.Module):
    """The AttnGate of SeerAttention-R, for decoding.

        Qg = RoPE(norm(W_q . the query heads of a KV head, concatenated)) at the token's position,
        Kg = RoPE(norm(W_k . (max, min, mean of a block's keys))) at the block's first position,
        scores = Qg Kg^T / sqrt(gate_dim), of the blocks that are complete.

    RoPE has (d, d + gate_dim / 2) as pairs. A KV head reads the newest block and those with the
    largest scores. Source: Gao et al. 2025, "SeerAttention-R: Sparse Attention Adaptation for Long
    Reasoning", arXiv:2506.08889; blocks of 64 and gate dim 128 as published. The prompt is dense
    there.

    Args:
        heads, heads_kv, head_dim: sizes of q and of the cache.
        gate_dim: even.
        block: 16, 32, 64 or 128 tokens.
        norm: RMSNorm before RoPE, with a weight of `gate_dim` each for q and k.
        rope_base: base of the model's RoPE.
        device, dtype: of the weights; None: torch's default.

    Attributes:
        weight_q: `[heads_kv, heads / heads_kv * head_dim, gate_dim]`.
        weight_k: `[heads_kv, 3 * head_dim, gate_dim]`.
        norm_q, norm_k: `[gate_dim]` or None.

    Raises:
        ValueError, TypeError: a size is not allowed.
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
        norm: bool = True,
        rope_base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_gate_sizes(heads, heads_kv, head_dim, gate_dim)
        if check_int("block", block) not in BLOCKS:
            raise ValueError(f"block must be 16, 32, 64 or 128, got {block}")
        self.heads, self.heads_kv, self.head_dim = heads, heads_kv, head_dim
        self.gate_dim, self.block = gate_dim, block

        of_weights: dict[str, Any] = {"device": device, "dtype": dtype}
        heads_of_group = heads // heads_kv
        self.weight_q = nn.Parameter(
            torch.empty((heads_kv, heads_of_group * head_dim, gate_dim), **of_weights)
        )
        self.weight_k = nn.Parameter(
            torch.empty((heads_kv, POOLS * head_dim, gate_dim), **of_weights)
        )
        self.norm_q = nn.Parameter(torch.empty(gate_dim, **of_weights)) if norm else None
        self.norm_k = nn.Parameter(torch.empty(gate_dim, **of_weights)) if norm else None
        rope_base = check_positive("rope_base", rope_base)
        half = torch.arange(0, gate_dim, 2, dtype=torch.float32, device=device)
        self.register_buffer("inv_freq", rope_base ** -(half / gate_dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights with variance 1 / inputs; the norms are 1."""
        for matrix in (self.weight_q, self.weight_k):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
        for scale in (self.norm_q, self.norm_k):
            if scale is not None:
                nn.init.ones_(scale)

    def compress(self, pools: Tensor, blocks: Tensor) -> Tensor:
        """Returns Kg of blocks.

        Args:
            pools: `[..., Hkv, 3 * head_dim]`, max, min and mean of a block's keys before RoPE.
            blocks: int `[...]`, the blocks' numbers.

        Returns:
            `[..., Hkv, gate_dim]` in the weights' dtype.
        """
        rows = torch.einsum("...hi,hio->...ho", pools.to(self.weight_k.dtype), self.weight_k)
        return self._placed(rows, self.norm_k, blocks * self.block)

    def forward(self, q: Tensor, compressed: Tensor, seq_lens: Tensor) -> Tensor:
        """Returns the scores of blocks.

        Args:
            q: `[B, 1, heads, head_dim]`, the new token's, before RoPE.
            compressed: `[B, n, Hkv, gate_dim]`, Kg of blocks.
            seq_lens: int `[B]`, with the new token.

        Returns:
            fp32 `[B, Hkv, n]`; -inf for the newest block and those behind it.
        """
        gate = self._of_queries(q, seq_lens).float()
        scores: Tensor = torch.einsum("bhd,bnhd->bhn", gate, compressed.float())
        scores = scores * self.gate_dim**-0.5
        newest = (seq_lens.long() - 1).div(self.block, rounding_mode="floor")
        before = torch.arange(compressed.shape[1], device=q.device) < newest[:, None, None]
        return scores.masked_fill(~before, -torch.inf)

    @torch.no_grad()
    def blocks(
        self,
        q: Tensor,
        compressed: Tensor,
        seq_lens: Tensor,
        *,
        budget: int | None = None,
        threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Chooses blocks for the new token of each request: `blocks` of `decode_attention`.

        Nothing waits for the device.

        Args:
            q, compressed, seq_lens: see `forward`.
            budget: tokens for each KV head, at least a block; the newest block is one of them.
                Needs a gate dim that is a multiple of 8, up to 256.
            threshold: instead, the least share of the softmax over the blocks before the newest.

        Returns:
            indices `[B, Hkv, n]` and counts `[B, Hkv]`, int32, and block. The newest block stands
            first, then the best: with a budget ascending, else by their shares.

        Raises:
            ValueError, TypeError: a shape or the gate dim does not match, or not exactly one of
                budget and threshold is given.
        """
        if budget is not None and threshold is None:
            return self._best(q, compressed, seq_lens, check_int("budget", budget, self.block))
        if budget is not None or threshold is None:
            raise ValueError("exactly one of budget and threshold must be given")
        least = check_number("threshold", threshold, 0, 1)
        # 0 for a request without such blocks
        scores = self(q, compressed, seq_lens).softmax(-1).nan_to_num(0)
        best = scores.topk(scores.shape[-1], dim=-1)
        newest = (seq_lens.long() - 1).div(self.block, rounding_mode="floor")
        newest = newest[:, None, None].expand(-1, self.heads_kv, 1)
        counts = (best.values > least).sum(-1) + (newest[..., 0] >= 0)
        return torch.cat([newest, best.indices], -1).int(), counts.int(), self.block

    def _best(
        self, q: Tensor, compressed: Tensor, seq_lens: Tensor, budget: int
    ) -> tuple[Tensor, Tensor, int]:
        """Quest's op with both bounds equal: its score is then the product with them."""
        check_head_dim("gate_dim", self.gate_dim)
        gate = self._of_queries(q, seq_lens)
        rows = compressed.flatten(0, 1)
        indices, counts = quest_pages.choose(
            gate,
            rows,
            rows,
            seq_lens,
            None,
            page=self.block,
            best=min(budget // self.block - 1, compressed.shape[1]),
        )
        return indices, counts, self.block

    def _of_queries(self, q: Tensor, seq_lens: Tensor) -> Tensor:
        """Qg, `[B, Hkv, gate_dim]`."""
        check_floats("q", q, 4, "[batch, 1, heads, head dim]")
        if q.shape[1:] != (1, self.heads, self.head_dim):
            raise ValueError(
                f"q must have shape [any, 1, {self.heads}, {self.head_dim}], got {list(q.shape)}"
            )
        rows = q[:, 0].unflatten(1, (self.heads_kv, -1)).flatten(2)
        rows = torch.einsum("bhi,hio->bho", rows.to(self.weight_q.dtype), self.weight_q)
        return self._placed(rows, self.norm_q, seq_lens - 1)

    def _placed(self, x: Tensor, weight: Tensor | None, positions: Tensor) -> Tensor:
        """Norm and RoPE of `[..., H, gate_dim]` at positions `[...]`."""
        if weight is not None:
            x = rms_norm(x, (self.gate_dim,), weight)
        angle = positions[..., None, None] * self.inv_freq.float()
        low, high = x.float().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


class SeerKeys:
    """The compressed keys of a batch's caches, kept up to date while keys are written.

    A block is compressed when its last key is written; until then its pools are kept. Nothing
    waits for the device.

    Args:
        gate: a `SeerDecodeGate`.
        batch, kv_len: requests, and the most keys that one can have.

    Attributes:
        compressed: `[batch, blocks, Hkv, gate_dim]`, for the gate; zero for blocks that are not
            complete.

    Raises:
        ValueError, TypeError: a size is not allowed.
    """

    @plain_ints
    def __init__(self, gate: SeerDecodeGate, batch: int, kv_len: int) -> None:
        check_instance("gate", gate, SeerDecodeGate)
        check_int("batch", batch, 1)
        self.gate = gate
        weight = gate.weight_k
        self._blocks = ceil_div(check_int("kv_len", kv_len, 1), gate.block)  # of a request
        # One block more takes what is not complete yet.
        shape = (batch * self._blocks + 1, gate.heads_kv, gate.gate_dim)
        self._compressed = weight.new_zeros(*shape, requires_grad=False)
        size = (batch, gate.heads_kv, gate.head_dim)
        self._pools = torch.zeros(POOLS, *size, dtype=torch.float32, device=weight.device)

    @property
    def compressed(self) -> Tensor:
        kept: Tensor = self._compressed[:-1].unflatten(0, (-1, self._blocks))
        return kept

    @torch.no_grad()
    def start(self, k: Tensor, seq_lens: Tensor) -> None:
        """Takes prompts.

        Args:
            k: `[batch, L, Hkv, head_dim]`, keys before RoPE; what is behind a prompt is not read
                into it.
            seq_lens: int `[batch]`, tokens of each prompt; below 0: none.

        Raises:
            ValueError, TypeError: a shape, dtype or device is not allowed.
        """
        block = self.gate.block
        batch, blocks = self._pools.shape[1], self._blocks
        self._check(k, (batch, "tokens", *self._pools.shape[2:]), "seq_lens", seq_lens)
        if ceil_div(k.shape[1], block) > blocks:
            raise ValueError(
                f"k must have {batch} requests of at most {blocks * block} keys, got shape "
                f"{list(k.shape)}"
            )
        lens = seq_lens.long().clamp(min=0)
        k = pad(k, (0, 0, 0, 0, 0, blocks * block - k.shape[1])).float()
        at = torch.arange(blocks * block, device=k.device)
        seen = (at < lens[:, None])[..., None, None].unflatten(1, (blocks, block))
        parts = k.unflatten(1, (blocks, block))
        high = parts.masked_fill(~seen, -torch.inf).amax(2)
        low = parts.masked_fill(~seen, torch.inf).amin(2)
        total = parts.masked_fill(~seen, 0).sum(2)
        pools = torch.cat([high, low, total / block], -1)
        number = torch.arange(blocks, device=k.device).expand(len(lens), -1)
        done = (number + 1) * block <= lens[:, None]
        made = self.gate.compress(pools.masked_fill(~done[..., None, None], 0), number)
        self.compressed.copy_(made.masked_fill(~done[..., None, None], 0))
        opened = (lens // block).clamp(max=blocks - 1)
        index = opened[:, None, None, None].expand(-1, 1, *high.shape[2:])
        self._pools.copy_(torch.stack([x.gather(1, index)[:, 0] for x in (high, low, total)]))

    @torch.no_grad()
    def write(self, k: Tensor, positions: Tensor) -> None:
        """Takes the key of one new token of each request.

        Args:
            k: `[batch, Hkv, head_dim]`, before RoPE.
            positions: int `[batch]`; below 0: none.

        Raises:
            ValueError, TypeError: a shape, dtype or device is not allowed.
        """
        self._check(k, self._pools.shape[1:], "positions", positions)
        block, at = self.gate.block, positions.long()
        k = k.float()
        begins, given = (at % block == 0)[:, None, None], (at >= 0)[:, None, None]
        high, low, total = self._pools
        high = torch.where(begins, k, torch.maximum(high, k))
        low = torch.where(begins, k, torch.minimum(low, k))
        total = torch.where(begins, k, total + k)
        self._pools.copy_(torch.where(given, torch.stack([high, low, total]), self._pools))
        number = at.clamp(min=0) // block
        made = self.gate.compress(torch.cat([high, low, total / block], -1), number)
        ends = (at >= 0) & (at % block == block - 1)
        requests = torch.arange(len(at), device=at.device)
        kept = ends & (number < self._blocks)
        where = torch.where(kept, requests * self._blocks + number, len(self._compressed) - 1)
        self._compressed[where] = made

    def _check(self, k: Tensor, shape: Sequence[int | str], name: str, numbers: Tensor) -> None:
        check_floats("k", k)
        check_shape("k", k, shape)
        check_device("k", k, self._pools.device)
        check_numbers(name, numbers, self._pools.shape[1:2], self._pools.device)
