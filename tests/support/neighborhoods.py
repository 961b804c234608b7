"""Problems of neighborhood attention, and the ways in which their tensors may lie in memory."""

import dataclasses

import torch
from named_case import NamedCase

from sparse_fmha import reference

DTYPES = (torch.float16, torch.bfloat16)
ROWS = ((64, DTYPES[0]), (96, DTYPES[1]), (128, DTYPES[1]), (256, DTYPES[0]))  # kernels differ


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    grid: tuple[int, ...]
    window: tuple[int, ...] | int
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    causal: tuple[bool, ...] | bool = False
    extra: int = 0
    batch: int = 1
    heads: int = 2
    heads_kv: int = 1
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    scale: float | None = None

    def options(self):
        """The arguments of neighborhood_attention that are no tensors."""
        names = ("window", "stride", "dilation", "causal", "scale")
        return {name: getattr(self, name) for name in names}

    def visible(self, device=None):
        return reference.neighborhood_mask(
            self.grid, self.window, self.stride, self.dilation, self.causal, self.extra, device
        )

    def seen_from(self, *query):
        """The indices along each axis that a query sees; for grids whose mask would be too large.

        window, stride, dilation and causal are tuples.
        """
        options = (self.window, self.stride, self.dilation, self.causal)
        axes = zip(self.grid, *options, query, strict=True)
        return [reference.neighborhood_mask(*axis)[i].nonzero()[:, 0] for *axis, i in axes]


def amid_nan(x, *dims):
    """A view of a tensor that is larger along these dimensions, and NaN beyond the view."""
    after = {1: 300, 2: 20, 3: 6}[x.dim() - 3]  # tokens: more than a tile's extent on one axis
    margins = [(1, 2), *[(2, after)] * (x.dim() - 3), (1, 2), (8, 16)]
    margins = [m if d in dims else (0, 0) for d, m in enumerate(margins)]
    sizes = [before + n + behind for n, (before, behind) in zip(x.shape, margins, strict=True)]
    view = x.new_full(sizes, torch.nan)
    for dim, (before, _) in enumerate(margins):
        view = view.narrow(dim, before, x.shape[dim])
    return view.copy_(x)


def contiguous(x):
    return x


def heads_first(x):
    """[B, H, *L, D] in memory."""
    return x.movedim(-2, 1).contiguous().movedim(1, -2)


def axes_reversed(x):
    """[*reversed(L), B, H, D] in memory."""
    order = [*reversed(range(x.dim() - 2)), -2, -1]
    return x.permute(order).contiguous().permute(order)


def every_other_head(x):
    wide = torch.stack((x, torch.full_like(x, torch.nan)), dim=-2)
    return wide.flatten(-3, -2)[..., ::2, :]


def wide_head_dim(x):
    return amid_nan(x, x.dim() - 1)


def crop(x):
    return amid_nan(x, *range(x.dim()))


def unaligned(x):
    """Neither the address nor any stride is a multiple of 16 bytes: read through a copy."""
    flat = x.new_full((x.shape[:-2].numel(), x.shape[-2] * (x.shape[-1] + 4) + 4), float("nan"))
    rows = flat.as_strided(
        (flat.shape[0], x.shape[-2], x.shape[-1]), (flat.shape[1], x.shape[-1] + 4, 1), 4
    )
    return rows.copy_(x.flatten(0, -3)).unflatten(0, x.shape[:-2])


LAYOUTS = (
    contiguous, heads_first, axes_reversed, every_other_head, wide_head_dim, crop, unaligned
)  # fmt: skip


def laid_out(layout, given):
    """The tensors, where there are, in a layout."""
    return [None if x is None else layout(x) for x in given]
