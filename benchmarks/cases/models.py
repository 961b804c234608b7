"""Models of diffusers in the shapes that people run, with random weights, and sparse settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model in one shape.

    Attributes:
        make: makes it with so many blocks of each kind, in full or tiny size, and its inputs.
        blocks: of each kind in the trained model.
        grid: tokens per axis; tokens: of all in the self-attention.
        variants: arguments of `enable` by name. None for the decoder of LTX-2.5, whose attention is
            a neighborhood anyhow.
        tiny: what takes the place of options on the tiny grid, by variant.
    """

    what: str
    make: Callable[[int, bool], tuple[nn.Module, Inputs]]
    blocks: tuple[int, ...]
    grid: tuple[int, ...]
    tokens: int
    variants: dict[str, dict[str, Any]] | None = None
    tiny: dict[str, dict[str, Any]] = field(default_factory=dict)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cpu")


def wan(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    from diffusers import WanTransformer3DModel

    heads, dim, text = (2, 32, 16) if tiny else (40, 128, 4096)
    frames, height, width = (4, 10, 12) if tiny else (21, 45, 80)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=dim,
        text_dim=text,
        ffn_dim=64 if tiny else 13824,
        num_layers=blocks,
    )
    return model, {
        "hidden_states": _noise(1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500], device="cpu"),
        "encoder_hidden_states": _noise(1, 8 if tiny else 512, text),
    }


def hunyuan_video(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    from diffusers import HunyuanVideoTransformer3DModel

    frames, height, width = (4, 10, 12) if tiny else (30, 48, 80)
    words, text = (8, 16) if tiny else (256, 4096)
    model = HunyuanVideoTransformer3DModel(
        num_attention_heads=2 if tiny else 24,
        attention_head_dim=32 if tiny else 128,
        num_layers=blocks,
        num_single_layers=blocks,
        text_embed_dim=text,
        rope_axes_dim=(4, 14, 14) if tiny else (16, 56, 56),
    )
    return model, {
        "hidden_states": _noise(1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500], device="cpu"),
        "encoder_hidden_states": _noise(1, words, text),
        "encoder_attention_mask": torch.ones(1, words, dtype=torch.long, device="cpu"),
        "pooled_projections": _noise(1, 768),
        "guidance": torch.tensor([6000.0], device="cpu"),
    }


def ltx2(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    from diffusers import LTX2VideoTransformer3DModel

    frames, height, width = (4, 10, 12) if tiny else (16, 34, 60)
    small = {
        "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32, "caption_channels": 16,
    }  # fmt: skip
    model = LTX2VideoTransformer3DModel(num_layers=blocks, **(small if tiny else {}))
    words, audio = (8, 7) if tiny else (1024, 126)
    caption = model.config.caption_channels
    return model, {
        "hidden_states": _noise(1, frames * height * width, 128),
        "audio_hidden_states": _noise(1, audio, 128),
        "encoder_hidden_states": _noise(1, words, caption),
        "audio_encoder_hidden_states": _noise(1, words, caption),
        "encoder_attention_mask": torch.ones(1, words, device="cpu"),
        "audio_encoder_attention_mask": torch.ones(1, words, device="cpu"),
        "timestep": torch.tensor([500], device="cpu"),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio,
    }


def minimax_h3(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    """Text, audio of two channels, and the video behind them."""
    from diffusers import MiniMaxH3Transformer3DModel

    frames, height, width = (4, 10, 12) if tiny else (37, 24, 42)
    words, audio = (8, 6) if tiny else (311, 125)
    small = {
        "num_attention_heads": 2, "attention_head_dim": 32, "hidden_size": 48, "ffn_dim": 64,
        "text_dim": 16, "freq_dim": 8, "time_embed_hidden_dim": 16, "time_embed_dim": 8,
        "rope_freq_dim": 4,
    }  # fmt: skip
    model = MiniMaxH3Transformer3DModel(
        num_layers=blocks, num_refiner_layers=1, **(small if tiny else {})
    )
    frame = torch.cartesian_prod(
        *(torch.linspace(-1, 1, n, device="cpu") * n for n in (height, width))
    )
    times = words + torch.arange(frames, device="cpu").float()
    text = torch.arange(words, device="cpu").float()
    sound = (words + torch.arange(audio, device="cpu").float()).repeat(2)
    parts = [
        nn.functional.pad(text[:, None], (0, 2)),
        nn.functional.pad(sound[:, None], (0, 2)),
        torch.cat([times.repeat_interleave(len(frame))[:, None], frame.repeat(frames, 1)], 1),
    ]
    kind = torch.cat([torch.full((len(x),), n, device="cpu") for n, x in enumerate(parts)])
    channels = model.config.in_channels * math.prod(model.config.patch_size)
    return model, {
        "hidden_states": _noise(1, len(parts[2]), channels),
        "audio_hidden_states": _noise(1, len(parts[1]), model.config.audio_in_channels),
        "encoder_hidden_states": _noise(1, words, model.config.text_dim),
        "timestep": torch.tensor([0.5, 1.0], device="cpu"),
        "timestep_indices": torch.tensor([1, 0, 0], device="cpu")[kind],
        "token_tags": torch.tensor([1, 2, 0], device="cpu")[kind],
        "position_ids": torch.cat(parts),
        "video_indices": (kind == 2).nonzero()[:, 0],
        "audio_indices": (kind == 1).nonzero()[:, 0],
        "text_indices": (kind == 0).nonzero()[:, 0],
    }


def flux2(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    from diffusers import Flux2Transformer2DModel

    side, words, text = (16, 8, 16) if tiny else (128, 512, 7680)
    small = {"attention_head_dim": 32, "axes_dims_rope": (8, 8, 8, 8)} if tiny else {}
    model = Flux2Transformer2DModel(
        num_layers=blocks,
        num_single_layers=blocks,
        num_attention_heads=2 if tiny else 24,
        joint_attention_dim=text,
        guidance_embeds=False,
        **small,
    )
    axis = torch.arange(side, device="cpu")
    one = torch.zeros(1, dtype=torch.long, device="cpu")
    return model, {
        "hidden_states": _noise(1, side * side, 128),
        "encoder_hidden_states": _noise(1, words, text),
        "timestep": torch.tensor([0.5], device="cpu"),
        "img_ids": torch.cartesian_prod(one, axis, axis, one).float()[None],
        "txt_ids": torch.zeros(1, words, 4, device="cpu"),
        "guidance": None,
    }


def ltx_decoder(blocks: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    """All its blocks; `blocks` is not used."""
    from diffusers import LTX2VideoDiffusionDecoderModel

    small = {
        "latent_channels": 4, "patch_size": 1, "decoder_head_dim": 8,
        "decoder_stage_channels": (16, 16, 16, 16, 16), "decoder_stage_depths": (1, 1, 1, 1, 1),
        "decoder_stage_kernels": ((3, 3, 3),) * 4, "decoder_stage5_kernel": (3, 5, 5),
        "decoder_upsample_strides": ((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)),
        "decoder_upsample_channel_reductions": (1, 1, 1, 1), "decoder_t_emb_dim": 8,
    }  # fmt: skip
    model = LTX2VideoDiffusionDecoderModel(**(small if tiny else {}))
    shape = (1, 4, 2, 5, 5) if tiny else (1, 128, 16, 16, 24)
    return model, {"z": _noise(*shape)}


def window(size: tuple[int, ...], stride: tuple[int, ...]) -> dict[str, Any]:
    return {"method": "neighborhood", "window": size, "stride": stride}


WINDOW = {"window": (3, 6, 6), "stride": (1, 2, 2)}
CASES = {
    "ltx2.5-decoder": Case(
        "LTX-2.5's decoder, 121 frames of 512x768 pixels", ltx_decoder, (24,), (121, 128, 192),
        121 * 128 * 192,
    ),
    "ltx2-1080p": Case(
        "LTX-2, 121 frames of 1088x1920 pixels", ltx2, (48,), (16, 34, 60), 16 * 34 * 60,
        {"sol-comfyui": {"preset": "sol-comfyui"}, "window": window((10, 16, 24), (2, 4, 8))},
        {"window": WINDOW},
    ),
    "minimax-h3-768p": Case(
        "MiniMax-H3, 5 s of 768x1344 pixels", minimax_h3, (50,), (37, 24, 42),
        37 * 24 * 42 + 311 + 250,
        {"sol-comfyui": {"preset": "sol-comfyui"},
         "subblock-minimax-h3": {"preset": "subblock-minimax-h3"}},
    ),
    "flux2-klein-2048": Case(
        "FLUX.2 klein 4B, 2048x2048 pixels", flux2, (5, 20), (128, 128), 128 * 128 + 512,
        {"sol-comfyui": {"preset": "sol-comfyui"}, "window": window((48, 48), (16, 16))},
        {"window": {"window": (8, 8), "stride": (2, 2)}},
    ),
    "wan-14b-720p": Case(
        "Wan 2.1 14B, 81 frames of 720x1280 pixels", wan, (40,), (21, 45, 80), 21 * 45 * 80,
        {"sol-comfyui": {"preset": "sol-comfyui"}, "radial-wan": {"preset": "radial-wan"}},
        {"radial-wan": {"block": 64}},
    ),
    "hunyuan-video-720p": Case(
        "HunyuanVideo, 117 frames of 768x1280 pixels", hunyuan_video, (20, 40), (30, 48, 80),
        30 * 48 * 80 + 256,
        {"gna-hunyuanvideo": {"preset": "gna-hunyuanvideo"},
         "sta-hunyuanvideo": {"preset": "sta-hunyuanvideo"}},
        {"gna-hunyuanvideo": WINDOW,
         "sta-hunyuanvideo": {"tile": (2, 5, 6), "window": (1, 1, 2)}},
    ),
}  # fmt: skip
