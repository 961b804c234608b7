"""More transformers of diffusers for images, with few random weights; see tiny_diffusion."""

from __future__ import annotations

import diffusers
import torch
from tiny_diffusion import BATCH, TEXT, Tiny

SHAPE = {"window": (4, 5), "stride": (1, 2), "dilation": (2, 1)}


def _positions(grid, columns, time=0):
    """`(time, row, column, ...)` of each token."""
    ids = torch.cartesian_prod(torch.full((1,), time), *(torch.arange(n) for n in grid))
    return torch.nn.functional.pad(ids, (0, columns - 3)).float()


def flux2(layers=1, references=0):
    model = diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=8,
    )
    grid = (9, 11)
    ids = [_positions(grid, 4), *(_positions((3, 4), 4, 10 * (i + 1)) for i in range(references))]
    inputs = {
        "hidden_states": torch.randn(BATCH, 99 + 12 * references, 8),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 0.7),
        "img_ids": torch.cat(ids).expand(BATCH, -1, -1),
        "txt_ids": torch.zeros(BATCH, TEXT, 4),
        "guidance": torch.ones(BATCH),
    }
    made = Tiny("Flux2Transformer2DModel", model, inputs, grid, TEXT, True, 2 * layers, **SHAPE)
    made.references = 12 * references
    return made


def krea2(layers=2, hidden=()):
    model = diffusers.Krea2Transformer2DModel(
        in_channels=8,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=12,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[1, list(hidden)] = False
    inputs = {
        "hidden_states": torch.randn(BATCH, 99, 8),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 2, 12),
        "encoder_attention_mask": mask,
        "timestep": torch.full((BATCH,), 0.7),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), _positions((9, 11), 3)]),
    }
    return Tiny("Krea2Transformer2DModel", model, inputs, (9, 11), TEXT, True, layers, **SHAPE)


class TinyZImage(Tiny):
    """Its time is from 0 to 1, and its latents are a list."""

    def __call__(self, timestep=None, **changed):
        if timestep is not None:
            changed["t"] = torch.full((BATCH,), 1 - timestep / 1000)
        with torch.no_grad():
            return torch.stack(self.model(**{**self.inputs, **changed}, return_dict=False)[0])


def z_image(layers=2, lengths=(TEXT, TEXT)):
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    inputs = {
        "x": [torch.randn(4, 1, 18, 22) for _ in range(BATCH)],
        "t": torch.full((BATCH,), 0.3),
        "cap_feats": [torch.randn(n, 12) for n in lengths],
    }
    longest = max(-n % 32 + n for n in lengths)
    others = 29 + longest  # of the image 29 are padding
    name = "ZImageTransformer2DModel"
    return TinyZImage(name, model, inputs, (9, 11), others, False, layers, **SHAPE)


def hunyuan_image(layers=1, lengths=(TEXT, 4), second=True):
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=8 if second else None,
        rope_axes_dim=(8, 8),
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 9, 11),
        "timestep": torch.full((BATCH,), 0.7),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).long(),
    }
    if second:
        inputs["encoder_hidden_states_2"] = torch.randn(BATCH, 5, 8)
        inputs["encoder_attention_mask_2"] = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    name = "HunyuanImageTransformer2DModel"
    text = TEXT + 5 * second
    return Tiny(name, model, inputs, (9, 11), text, False, 2 * layers, **SHAPE)


def sd3(layers=2):
    """As in 3.5 medium, the first block has a self-attention of the image alone, too."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=22,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=6,
        pos_embed_max_size=11,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 18, 22),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "pooled_projections": torch.randn(BATCH, 6),
        "timestep": torch.full((BATCH,), 700),
    }
    return Tiny("SD3Transformer2DModel", model, inputs, (9, 11), TEXT, False, layers + 1, **SHAPE)


def chroma(layers=1, lengths=(TEXT, 4), dtype=torch.float32):
    """The mask of its pipeline: floats, of the text without padding and the image."""
    model = diffusers.ChromaTransformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    seen = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    inputs = {
        "hidden_states": torch.randn(BATCH, 99, 8),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 0.7),
        "img_ids": _positions((9, 11), 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "attention_mask": torch.cat([seen, torch.ones(BATCH, 99, dtype=torch.bool)], 1).to(dtype),
    }
    return Tiny("ChromaTransformer2DModel", model, inputs, (9, 11), TEXT, True, 2 * layers, **SHAPE)
