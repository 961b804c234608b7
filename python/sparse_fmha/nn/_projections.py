"""Base class of the modules: a projection to q, k and v, and an output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_fmha._checks import MAX_HEAD_DIM, check_flag, check_int, check_number, finite


class SelfAttention(nn.Module):
    """Base class of the modules, with parameter names as in NATTEN and timm.

    Attributes:
        qkv: `nn.Linear(dim, (num_heads + 2 * num_heads_kv) * head_dim)`: rows of q, then k, then v.
        proj: `nn.Linear(dim, dim)`.
        proj_drop: `nn.Dropout` after `proj`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_heads_kv: int | None,
        qkv_bias: bool,
        proj_bias: bool,
        proj_drop: float,
        scale: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, 1)
        self.num_heads = check_int("num_heads", num_heads, 1)
        if num_heads_kv is None:
            num_heads_kv = num_heads
        self.num_heads_kv = check_int("num_heads_kv", num_heads_kv, 1)
        if num_heads % num_heads_kv:
            raise ValueError(
                f"num_heads must be a multiple of num_heads_kv = {num_heads_kv}, got {num_heads}"
            )
        self.head_dim, rest = divmod(dim, num_heads)
        if rest or self.head_dim % 8 or not 8 <= self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"dim / num_heads must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got "
                f"{dim} / {num_heads}"
            )
        check_flag("qkv_bias", qkv_bias)
        check_flag("proj_bias", proj_bias)
        self.scale = finite("scale", scale)
        width = (num_heads + 2 * num_heads_kv) * self.head_dim
        self.qkv = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(check_number("proj_drop", proj_drop, 0, 1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: q `[B, *L, num_heads, head_dim]`, k and v `[B, *L, num_heads_kv, head_dim]`."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [batch, ..., {self.dim}], got {list(x.shape)}")
        heads = self.num_heads, self.num_heads_kv, self.num_heads_kv
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(heads, -2)
        return q, k, v

    def _result(self, out: Tensor) -> Tensor:
        result: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return result

    def _sizes_repr(self) -> str:
        heads = f"dim={self.dim}, num_heads={self.num_heads}"
        if self.num_heads_kv != self.num_heads:
            heads += f", num_heads_kv={self.num_heads_kv}"
        return heads
