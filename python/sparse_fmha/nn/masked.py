"""A module for self-attention with a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_fmha._checks import check_floats
from sparse_fmha.attention import block_sparse_attention, stripe_attention
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.nn._projections import SelfAttention

if TYPE_CHECKING:
    from typing_extensions import Self

Mask = BlockMask | StripeMask


class SparseSelfAttention(SelfAttention):
    """Self-attention of a sequence with a `BlockMask` or a `StripeMask`.

        q, k, v = qkv(x);  y = proj(block_sparse_attention(q, k, v, mask))

    Instead of a mask, pass a function of q and k to select a mask from the input:

        def choose(q, k):
            grid = sparse_fmha.BlockGrid.of(q, k, causal=True)
            scores = selection.block_scores(q, k, grid)
            return grid.mask(selection.top_k_blocks(scores, density=0.2) | grid.diagonal())

        layer = sparse_fmha.nn.SparseSelfAttention(512, 8, choose)

    Args:
        dim: channels of a token; `dim / num_heads`, the head dim, is a multiple of 8 from 8 to 256.
        num_heads: heads of q.
        mask: a mask for one sequence length, which the module moves with its parameters; or a
            function of q `[B, L, num_heads, head_dim]` and k `[B, L, num_heads_kv, head_dim]` that
            returns a mask on their device. None: pass it to `forward`. Not in the `state_dict`.
        num_heads_kv: heads of k and v; num_heads is a multiple of it (GQA, MQA). Default num_heads.
        qkv_bias, proj_bias: whether the projections have biases.
        scale: scale of q.k; default `head_dim**-0.5`.
        proj_drop: dropout probability after the output projection.
        device, dtype: device and dtype of the parameters; None: torch's default.

    Shape:
        x `[B, L, dim]` to `[B, L, dim]`.

    Raises:
        ValueError, TypeError: a size or the type of mask is not allowed. In `forward`: there is no
            mask, or as in `block_sparse_attention` and `stripe_attention`, whose dtypes, devices
            and gradients this module supports.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mask: Mask | Callable[[Tensor, Tensor], Mask] | None = None,
        *,
        num_heads_kv: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, num_heads_kv, qkv_bias, proj_bias, proj_drop, scale, device, dtype
        )
        if not (mask is None or isinstance(mask, Mask) or callable(mask)):
            raise TypeError(
                "mask must be a BlockMask, a StripeMask, a function of q and k or None, got "
                f"{type(mask).__name__}"
            )
        self.mask = mask

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Maps x `[B, L, dim]` to `[B, L, dim]`; a mask given here replaces the module's."""
        check_floats("x", x, 3, "[batch, tokens, channels]")
        q, k, v = self._project(x)
        if mask is None:
            mask = self._mask_for(q, k)
        if isinstance(mask, BlockMask):
            return self._result(block_sparse_attention(q, k, v, mask, scale=self.scale))
        if isinstance(mask, StripeMask):
            return self._result(stripe_attention(q, k, v, mask, scale=self.scale))
        raise TypeError(f"mask must be a BlockMask or a StripeMask, got {type(mask).__name__}")

    def _mask_for(self, q: Tensor, k: Tensor) -> Mask:
        if self.mask is None:
            raise ValueError("mask must be given, to the module or to this call, got None")
        return self.mask if isinstance(self.mask, Mask) else self.mask(q, k)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Applies `to`, `cuda` or `half`; masks hold integers, so they only change device."""
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if isinstance(self.mask, Mask):
            self.mask = self.mask._map_tensors(lambda tensor: fn(tensor).contiguous())
        return self

    def extra_repr(self) -> str:
        """Returns sizes and the mask."""
        return f"{self._sizes_repr()}, mask={self.mask}"
