"""Diffusion transformers in real shapes, with random weights, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A transformer of `heads` heads; `layers` of them are in the trained model."""

    what: str
    make: Callable[[Case, int], nn.Module]
    inputs: Callable[[Case], dict[str, torch.Tensor]]
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    text: int
    layers: tuple[int, ...]
    heads: int
    text_first: bool = False
    dim: int = 128
    text_dim: int = 4096

    def cut(self, layers: int) -> tuple[int, ...]:
        return tuple(min(layers, n) for n in self.layers)


def wan(case: Case, layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.dim,
        text_dim=case.text_dim,
        ffn_dim=case.heads * case.dim * 35 // 6,
        num_layers=case.cut(layers)[0],
    )


def hunyuan_video(case: Case, layers: int) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    dual, single = case.cut(layers)
    return HunyuanVideoTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.dim,
        num_layers=dual,
        num_single_layers=single,
        text_embed_dim=case.text_dim,
        rope_axes_dim=rotary_dims(case.dim),
    )


def flux(case: Case, layers: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    dual, single = case.cut(layers)
    return FluxTransformer2DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.dim,
        num_layers=dual,
        num_single_layers=single,
        joint_attention_dim=case.text_dim,
        guidance_embeds=True,
        axes_dims_rope=rotary_dims(case.dim),
    )


def rotary_dims(dim: int) -> tuple[int, int, int]:
    """(16, 56, 56) of 128, as both models have it."""
    return dim // 8, dim * 7 // 16, dim * 7 // 16


def video_inputs(case: Case) -> dict[str, torch.Tensor]:
    frames, height, width = case.grid
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, device="cpu"),
        "timestep": torch.tensor([500], device="cpu"),
    }
    # Wan has no text in its self-attention, but in cross-attention.
    inputs["encoder_hidden_states"] = torch.randn(1, case.text or 512, case.text_dim, device="cpu")
    if case.text:
        inputs["encoder_attention_mask"] = torch.ones(1, case.text, dtype=torch.long, device="cpu")
        inputs["pooled_projections"] = torch.randn(1, 768, device="cpu")
        inputs["guidance"] = torch.tensor([6000.0], device="cpu")
    return inputs


def flux_inputs(case: Case) -> dict[str, torch.Tensor]:
    places = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in case.grid))
    return {
        "hidden_states": torch.randn(1, math.prod(case.grid), 64, device="cpu"),
        "encoder_hidden_states": torch.randn(1, case.text, case.text_dim, device="cpu"),
        "pooled_projections": torch.randn(1, 768, device="cpu"),
        "timestep": torch.tensor([0.5], device="cpu"),
        "img_ids": nn.functional.pad(places, (1, 0)).float(),
        "txt_ids": torch.zeros(case.text, 3, device="cpu"),
        "guidance": torch.tensor([3.5], device="cpu"),
    }


CASES = {
    "wan-1.3b-480p": Case(
        "Wan 2.1 1.3B, 81 frames of 480x832 pixels", wan, video_inputs,
        (21, 30, 52), (12, 16, 24), (4, 8, 8), 0, (30,), 12,
    ),
    "hunyuan-video-720p": Case(
        "HunyuanVideo, 129 frames of 720x1280 pixels", hunyuan_video, video_inputs,
        (33, 45, 80), (18, 24, 24), (6, 8, 8), 256, (20, 40), 24,
    ),
    "flux-4096": Case(
        "FLUX.1-dev, 4096x4096 pixels", flux, flux_inputs,
        (256, 256), (80, 80), (16, 16), 512, (19, 38), 24, text_first=True,
    ),
}  # fmt: skip


def tiny(case: Case) -> Case:
    """The same with few channels and tokens."""
    axes = len(case.grid)
    grid, window = ((4, 10, 12), (3, 6, 6)) if axes == 3 else ((16, 16), (8, 8))
    few = {
        "what": f"like {case.what.partition(',')[0]}, but tiny",
        "heads": 2,
        "dim": 32,
        "text_dim": 32,
        "text": min(case.text, 8),
    }
    return replace(case, grid=grid, window=window, stride=(1, 2, 2)[-axes:], **few)
