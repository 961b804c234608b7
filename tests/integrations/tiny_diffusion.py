"""Transformers of diffusers with few random weights, and the masked torch attention they equal."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from sparse_fmha import reference

SHARP = ("norm_q.weight", "norm_k.weight", "query_norm.weight", "key_norm.weight")
TEXT = 10
BATCH = 2


@dataclass
class Tiny:
    """A model, its inputs, and what the library has to find out about it."""

    name: str
    model: torch.nn.Module
    inputs: dict
    grid: tuple[int, ...]
    text: int
    text_first: bool = False
    layers: int = 2
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    references: int = 0  # tokens after the grid that are not text
    options: dict = field(init=False)

    def __post_init__(self):
        self.options = {n: getattr(self, n) for n in ("window", "stride", "dilation")}

    def __call__(self, timestep=None, **changed):
        """The output; timestep of 0 to 1000, which is 0 to 1 for images."""
        inputs = {**self.inputs, **changed}
        if timestep is not None:
            timestep = timestep / 1000 if inputs["timestep"].is_floating_point() else timestep
            inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        with torch.no_grad():
            return self.model(**inputs, return_dict=False)[0]

    @property
    def image(self):
        return math.prod(self.grid)

    def visible(self, window, stride=1, dilation=1):
        """Bool [tokens, tokens] in the model's order; text sees and is seen by all."""
        return self.with_text(reference.neighborhood_mask(self.grid, window, stride, dilation))

    def with_text(self, image):
        before, behind = (self.text, 0) if self.text_first else (0, self.text)
        sides = before, behind + self.references
        return torch.nn.functional.pad(image, sides * 2, value=True)


def _both(visible, attn_mask):
    if attn_mask is None:
        return visible
    if attn_mask.dtype == torch.bool:
        return visible & attn_mask
    return attn_mask.masked_fill(~visible, -torch.inf)  # of Chroma, added to the scores


@contextlib.contextmanager
def torch_attention_with(*masks, layers=None):
    """torch's attention with a mask wherever queries and keys are as many as the mask's."""
    own, seen = torch.nn.functional.scaled_dot_product_attention, []
    of_shape = {tuple(mask.shape): mask for mask in masks}

    def masked(query, key, value, attn_mask=None, **options):
        visible = of_shape.get((query.shape[-2], key.shape[-2]))
        if visible is not None:
            seen.append(None)
            if layers is None or len(seen) - 1 in layers:
                attn_mask = _both(visible, attn_mask)
        return own(query, key, value, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = masked
    try:
        yield seen
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


def flux(layers=1):
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 6, 6),
    )
    grid = (9, 11)
    ids = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    inputs = {
        "hidden_states": torch.randn(BATCH, 99, 8),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "pooled_projections": torch.randn(BATCH, 6),
        "timestep": torch.full((BATCH,), 0.7),
        "img_ids": torch.nn.functional.pad(ids, (1, 0)).float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    shape = {"window": (4, 5), "stride": (1, 2), "dilation": (2, 1)}
    return Tiny("FluxTransformer2DModel", model, inputs, grid, TEXT, True, 2 * layers, **shape)


VIDEO = {"window": (3, 3, 2), "stride": (1, 2, 1), "dilation": (1, 1, 2)}


def wan(layers=2, frames=4, **config):
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        **config,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, frames, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
    }
    grid = (frames, 5, 6)
    return Tiny("WanTransformer3DModel", model, inputs, grid, 0, False, layers, **VIDEO)


def hunyuan_video(layers=1, lengths=(TEXT, TEXT), **config):
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=False,
        rope_axes_dim=(4, 6, 6),
        **config,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 4, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).long(),
        "pooled_projections": torch.randn(BATCH, 6),
        "timestep": torch.full((BATCH,), 700),
    }
    name = "HunyuanVideoTransformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), TEXT, False, 2 * layers, **VIDEO)


def cogvideox(layers=2, patch_size_t=None):
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=layers,
        sample_width=12,
        sample_height=10,
        sample_frames=13,
        patch_size_t=patch_size_t,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    frames = 4 * (patch_size_t or 1)
    inputs = {
        "hidden_states": torch.randn(BATCH, frames, 4, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
        "image_rotary_emb": tuple(torch.randn(120, 16).clamp(-1, 1) for _ in range(2)),
    }
    name = "CogVideoXTransformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), TEXT, True, layers, **VIDEO)


def wan_vace(layers=1):
    model = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        vace_layers=list(range(layers)),
        vace_in_channels=6,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 4, 10, 12),
        "control_hidden_states": torch.randn(BATCH, 6, 4, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
    }
    name = "WanVACETransformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), 0, False, 2 * layers, **VIDEO)


def ltx(layers=2):
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=12,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 120, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "encoder_attention_mask": torch.ones(BATCH, TEXT),
        "timestep": torch.full((BATCH,), 700),
        "num_frames": 4,
        "height": 5,
        "width": 6,
    }
    inputs["encoder_attention_mask"][1, 4:] = 0  # of cross-attention
    return Tiny("LTXVideoTransformer3DModel", model, inputs, (4, 5, 6), 0, False, layers, **VIDEO)


def qwen_image(layers=2, lengths=(TEXT, 4)):
    model = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 99, 8),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "encoder_hidden_states_mask": torch.arange(TEXT) < torch.tensor(lengths)[:, None],
        "timestep": torch.full((BATCH,), 0.7),
        "img_shapes": [[(1, 9, 11)]] * BATCH,
    }
    shape = {"window": (4, 5), "stride": (1, 2), "dilation": (2, 1)}
    return Tiny("QwenImageTransformer2DModel", model, inputs, (9, 11), TEXT, True, layers, **shape)


MAKERS = {
    "flux": flux,
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "cogvideox": cogvideox,
    "wan_vace": wan_vace,
    "ltx": ltx,
    "qwen_image": qwen_image,
}


def make(name, **options):
    torch.manual_seed(0)
    return sharpen(MAKERS[name](**options))


def sharpen(tiny):
    """Weights with which attention matters."""
    tiny.model.eval()
    # As initialised, some models hardly listen to attention: gates and projections are small.
    for name, parameter in tiny.model.named_parameters():
        sharp = name.endswith(SHARP)
        torch.nn.init.normal_(parameter, mean=2.0 if sharp else 0.0, std=0.25)
    return tiny
