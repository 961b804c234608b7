"""More transformers of diffusers with few random weights; see tiny_diffusion."""

from __future__ import annotations

import diffusers
import torch
from tiny_diffusion import BATCH, TEXT, VIDEO, Tiny, sharpen

IMAGE = {"window": (4, 5), "stride": (1, 2), "dilation": (2, 1)}


def _positions(grid, columns, time=0):
    """`(time, row, column, ...)` of each token."""
    ids = torch.cartesian_prod(torch.full((1,), time), *(torch.arange(n) for n in grid))
    return torch.nn.functional.pad(ids, (0, columns - 3)).float()


def ltx2(layers=2, **config):
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=layers,
        caption_channels=12,
        **config,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 120, 4),
        "audio_hidden_states": torch.randn(BATCH, 7, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "audio_encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "encoder_attention_mask": torch.ones(BATCH, TEXT),
        "audio_encoder_attention_mask": torch.ones(BATCH, TEXT),
        "timestep": torch.full((BATCH,), 700),
        "num_frames": 4,
        "height": 5,
        "width": 6,
        "audio_num_frames": 7,
    }
    return Tiny("LTX2VideoTransformer3DModel", model, inputs, (4, 5, 6), 0, layers=layers, **VIDEO)


class TinyMiniMaxH3(Tiny):
    """Its time is from 0 to 1, and rows of one call have different ones."""

    def __call__(self, timestep=None, **changed):
        if timestep is not None:
            # Audio is behind, keyframes are clean; as in the pipeline, times are sorted.
            now = 1 - timestep / 1000
            changed["timestep"] = torch.tensor([0.9 * now, now, 1.0])
        with torch.no_grad():
            return self.model(**{**self.inputs, **changed}, return_dict=False)[0]


def minimax_h3(layers=2, keyframes=1):
    """Text, keyframes, audio of two channels, and the video, which alone is the grid."""
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=layers,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=2,
        audio_in_channels=4,
        text_dim=12,
        freq_dim=8,
        time_embed_hidden_dim=16,
        time_embed_dim=8,
        rope_freq_dim=2,
    )
    frame = torch.cartesian_prod(*(torch.linspace(-1, 1, n) * n for n in (5, 6)))
    times = TEXT + torch.tensor([0.0, 1.7, 8.3, 15.0])  # not at equal distances
    text = torch.nn.functional.pad(torch.arange(TEXT)[:, None], (0, 2)).float()
    still = torch.cat([torch.full((30, 1), float(TEXT)), frame], 1)
    audio = torch.nn.functional.pad(TEXT + torch.arange(7.0)[:, None], (0, 2)).repeat(2, 1)
    video = torch.cat([times.repeat_interleave(30)[:, None], frame.repeat(4, 1)], 1)
    parts = [text, *[still] * keyframes, audio, video]
    kinds = [0, *[1] * keyframes, 2, 3]
    kind = torch.cat([torch.full((len(x),), k) for x, k in zip(parts, kinds, strict=True)])
    inputs = {
        "hidden_states": torch.randn(BATCH, 30 * (4 + keyframes), 8),
        "audio_hidden_states": torch.randn(BATCH, 14, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.tensor([0.2, 0.3, 1.0]),
        "timestep_indices": torch.tensor([1, 2, 0, 1])[kind],
        "token_tags": torch.tensor([1, 0, 2, 0])[kind],
        "position_ids": torch.cat(parts),
        "video_indices": ((kind == 1) | (kind == 3)).nonzero()[:, 0],
        "audio_indices": (kind == 2).nonzero()[:, 0],
        "text_indices": (kind == 0).nonzero()[:, 0],
    }
    name = "MiniMaxH3Transformer3DModel"
    others = TEXT + 30 * keyframes + 14
    return TinyMiniMaxH3(name, model, inputs, (4, 5, 6), others, True, layers, **VIDEO)


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
    made = Tiny("Flux2Transformer2DModel", model, inputs, grid, TEXT, True, 2 * layers, **IMAGE)
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
    return Tiny("Krea2Transformer2DModel", model, inputs, (9, 11), TEXT, True, layers, **IMAGE)


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
    return TinyZImage(name, model, inputs, (9, 11), others, False, layers, **IMAGE)


def cosmos(layers=2):
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        mlp_ratio=2.0,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 10, 12),
        extra_pos_embed_type=None,
        concat_padding_mask=False,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 4, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
    }
    return Tiny("CosmosTransformer3DModel", model, inputs, (4, 5, 6), 0, False, layers, **VIDEO)


def hunyuan_video_15(layers=2, lengths=(TEXT, 4), image=True):
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 4, 5, 6),
        "timestep": torch.full((BATCH,), 0.7),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).long(),
        "encoder_hidden_states_2": torch.randn(BATCH, 5, 8),
        "encoder_attention_mask_2": (torch.arange(5) < torch.tensor([3, 0])[:, None]).long(),
        "image_embeds": torch.randn(BATCH, 6, 8) * image,  # of zeros: none
    }
    name = "HunyuanVideo15Transformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), TEXT + 5 + 6, False, layers, **VIDEO)


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
    return Tiny(name, model, inputs, (9, 11), text, False, 2 * layers, **IMAGE)


def kandinsky5(layers=2):
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=6,
        time_dim=8,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=layers,
        axes_dims=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 10, 12, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 12),
        "timestep": torch.full((1,), 700),
        "pooled_projections": torch.randn(1, 6),
        "visual_rope_pos": [torch.arange(n) for n in (4, 5, 6)],
        "text_rope_pos": torch.arange(TEXT),
    }
    name = "Kandinsky5Transformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), 0, False, layers, **VIDEO)


def _wan_like(name, layers=2, **config):
    model = getattr(diffusers, name)(
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
        "hidden_states": torch.randn(BATCH, 4, 4, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
    }
    return Tiny(name, model, inputs, (4, 5, 6), 0, False, layers, **VIDEO)


def skyreels(**options):
    return _wan_like("SkyReelsV2Transformer3DModel", **options)


def chronoedit(**options):
    return _wan_like("ChronoEditTransformer3DModel", **options)


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
    return Tiny("SD3Transformer2DModel", model, inputs, (9, 11), TEXT, False, layers + 1, **IMAGE)


def wan_animate(layers=2):
    model = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        image_dim=None,
        added_kv_proj_dim=None,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 12, 4, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
        "pose_hidden_states": torch.randn(BATCH, 4, 3, 10, 12),
        "face_pixel_values": torch.randn(BATCH, 3, 12, 16, 16),
    }
    name = "WanAnimateTransformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), 0, False, layers, **VIDEO)


MORE = {
    "ltx2": ltx2,
    "minimax_h3": minimax_h3,
    "flux2": flux2,
    "krea2": krea2,
    "z_image": z_image,
    "cosmos": cosmos,
    "hunyuan_video_15": hunyuan_video_15,
    "hunyuan_image": hunyuan_image,
    "kandinsky5": kandinsky5,
    "skyreels": skyreels,
    "chronoedit": chronoedit,
    "wan_animate": wan_animate,
    "sd3": sd3,
}


def make(name, **options):
    torch.manual_seed(0)
    return sharpen(MORE[name](**options))
