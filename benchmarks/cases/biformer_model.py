"""A vision transformer in the shape of BiFormer-T, with attention that is given from outside.

Sources as in `patterns.biformer`. Four stages at a quarter to a 32nd of the image's side, of 64 to
512 channels in heads of 32; a query sees the tokens of its region's top-k regions, all in the last
stage. A 5x5 depthwise convolution of the values is added to attention. Weights are random.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparse_fmha
from sparse_fmha import patterns

HEAD = 32
TOP_K = (1, 4, 16, None)  # None: all regions
REGIONS = {224: 7, 512: 8}  # per side, by pixels; as for ImageNet and ADE20K


@dataclass(frozen=True)
class Stage:
    """Tokens of a stage's images, `side` x `side`, in `regions` x `regions` regions."""

    side: int
    regions: int
    top_k: int | None
    layout: patterns.BiFormerLayout | patterns.BiFormerPacking | None


Attend = Callable[[Tensor, Tensor, Tensor, Stage, float], Tensor]  # the last is the scale


def stages(pixels: int, device: str) -> list[Stage]:
    """Regions of 64 tokens and more are padded to blocks of their own, smaller ones packed."""
    regions, found = REGIONS[pixels], []
    for n, top_k in enumerate(TOP_K):
        side = pixels // (4 << n)
        layout = None
        if top_k is not None:
            region = patterns.image_regions(side, side, regions, device=device)
            padded = (side // regions) ** 2 % 64 == 0
            kind = patterns.BiFormerLayout if padded else patterns.BiFormerPacking
            layout = kind(region)
        found.append(Stage(side, regions, top_k, layout))
    return found


def routed(q: Tensor, k: Tensor, v: Tensor, stage: Stage, scale: float) -> Tensor:
    """Bi-level routing attention by this library."""
    layout = stage.layout
    if layout is None:
        return sparse_fmha.attention(q, k, v, scale=scale)
    if isinstance(layout, patterns.BiFormerPacking):
        queries = keys = layout.order
        mask = patterns.biformer_packed(q, k, layout, top_k=stage.top_k)
    else:
        queries, keys = layout.queries, layout.keys
        mask = patterns.biformer(q, k, layout, top_k=stage.top_k)
    permuted = queries.permute(q), keys.permute(k), keys.permute(v)
    return queries.undo(sparse_fmha.block_sparse_attention(*permuted, mask, scale=scale))


def dense(q: Tensor, k: Tensor, v: Tensor, stage: Stage, scale: float) -> Tensor:
    """torch's attention of all tokens."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // HEAD
        self.position = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.local = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.out = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 3 * channels), nn.GELU(), nn.Linear(3 * channels, channels)
        )

    def forward(self, x: Tensor, stage: Stage, attend: Attend) -> Tensor:
        """x: `[B, channels, side, side]`."""
        x = x + self.position(x)
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norms[0](tokens)).unflatten(2, (3, self.heads, HEAD)).unbind(2)
        mixed = attend(q, k, v, stage, tokens.shape[2] ** -0.5).flatten(2)
        near = self.local(v.flatten(2).transpose(1, 2).unflatten(2, (stage.side, stage.side)))
        tokens = tokens + self.out(mixed + near.flatten(2).transpose(1, 2))
        tokens = tokens + self.mlp(self.norms[1](tokens))
        return tokens.transpose(1, 2).unflatten(2, (stage.side, stage.side))


class BiFormer(nn.Module):
    """Images `[B, 3, pixels, pixels]` to logits `[B, classes]`."""

    def __init__(
        self,
        pixels: int,
        *,
        channels: int = 64,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        classes: int = 1000,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.stages = stages(pixels, device)
        widths = [3, *(channels << n for n in range(len(depths)))]
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 7 if a == 3 else 3, 4 if a == 3 else 2, 3 if a == 3 else 1)
            for a, b in itertools.pairwise(widths)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(width) for _ in range(depth))
            for width, depth in zip(widths[1:], depths, strict=True)
        )
        self.head = nn.Linear(widths[-1], classes)
        self.to(device)

    def forward(self, images: Tensor, attend: Attend = routed) -> Tensor:
        x = images
        for stage, down, blocks in zip(self.stages, self.down, self.blocks, strict=True):
            x = down(x)
            for block in blocks:
                x = block(x, stage, attend)
        return self.head(x.mean((2, 3)))


def drawn(pixels: int, batch: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, 3, pixels, pixels)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
