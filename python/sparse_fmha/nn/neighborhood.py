"""A module for neighborhood self-attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_floats, per_axis
from sparse_fmha.attention import neighborhood_attention
from sparse_fmha.nn._projections import SelfAttention


class NeighborhoodAttention(SelfAttention):
    """Self-attention on a grid of tokens, each to a window around it.

        q, k, v = qkv(x);  y = proj(neighborhood_attention(q, k, v, window, ...))

    One class supports grids of one to three axes. It replaces NATTEN's `NeighborhoodAttention1D`,
    `2D` and `3D` and loads their `state_dict`. Source: Hassani et al.
    2023, "Neighborhood Attention Transformer", arXiv:2204.07143; stride: Hassani et al. 2025,
    "Generalized Neighborhood Attention", arXiv:2504.16922.

    Args:
        dim: channels of a token; `dim / num_heads`, the head dim, is a multiple of 8 from 8 to 256.
        num_heads: heads of q, k and v.
        window, stride, dilation, causal: as in `sparse_fmha.neighborhood_attention`: one value for
            all axes, or a tuple with one for each. A tuple fixes the number of axes; otherwise the
            input determines it.
        qkv_bias, proj_bias: whether the projections have biases.
        scale: scale of q.k; default `head_dim**-0.5`.
        proj_drop: dropout probability after the output projection.
        device, dtype: device and dtype of the parameters; None: torch's default.

    Shape:
        x `[B, *L, dim]` to `[B, *L, dim]`, with `*L` the grid: one to three axes.

    Raises:
        ValueError, TypeError: a size is not allowed. In `forward`: x has a wrong number of axes or
            channels, or as in `neighborhood_attention`, whose dtypes, devices and gradients this
            module supports.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, None, qkv_bias, proj_bias, proj_drop, scale, device, dtype)
        options = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
        lengths = {len(value) for value in options.values() if isinstance(value, Sequence)}
        axes = lengths.pop() if len(lengths) == 1 else None
        if lengths or axes not in (None, 1, 2, 3):
            raise ValueError(
                "tuples of window, stride, dilation and causal must have the same length, from 1 "
                f"to 3, got {window!r}, {stride!r}, {dilation!r} and {causal!r}"
            )
        self.axes = axes
        self.window = _checked("window", window, axes)
        self.stride = _checked("stride", stride, axes)
        self.dilation = _checked("dilation", dilation, axes)
        for axis in range(axes or 1):
            w, s = (per_axis("", x, axes or 1)[axis] for x in (self.window, self.stride))
            if s > w:
                place = "" if axes is None else f"[{axis}]"
                raise ValueError(f"stride{place} must be from 1 to window{place} = {w}, got {s}")
        flags = per_axis("causal", causal, axes or 1, bool)
        self.causal = tuple(map(bool, flags)) if axes else bool(flags[0])

    def forward(self, x: Tensor) -> Tensor:
        """Maps x `[B, *L, dim]` to `[B, *L, dim]`."""
        check_floats("x", x)
        axes = x.dim() - 2
        if axes not in ((1, 2, 3) if self.axes is None else (self.axes,)):
            wanted = "one to three" if self.axes is None else str(self.axes)
            raise ValueError(
                f"x must have shape [batch, *tokens, {self.dim}] with {wanted} token axes, got "
                f"{list(x.shape)}"
            )
        q, k, v = self._project(x)
        out = neighborhood_attention(
            q,
            k,
            v,
            self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.causal,
            scale=self.scale,
        )
        return self._result(out)

    def extra_repr(self) -> str:
        """Returns sizes and the options that are not default."""
        text = f"{self._sizes_repr()}, window={self.window}"
        for name, default in (("stride", 1), ("dilation", 1), ("causal", False)):
            value = getattr(self, name)
            if value not in (default, (default,) * (self.axes or 1)):
                text += f", {name}={value}"
        return text


def _checked(name: str, value: int | Sequence[int], axes: int | None) -> int | tuple[int, ...]:
    """Returns one int for all axes, or one per axis if their number is known."""
    entries = per_axis(name, value, axes or 1)
    if min(entries) < 1:
        raise ValueError(f"{name} must be at least 1 on every axis, got {value!r}")
    return tuple(entries) if axes else entries[0]
