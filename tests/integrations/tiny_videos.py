"""More transformers of diffusers for videos, with few random weights; see tiny_diffusion."""

from __future__ import annotations

import diffusers
import torch
from tiny_diffusion import BATCH, TEXT, VIDEO, Tiny


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


def cosmos(layers=2, **config):
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
        **config,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 4, 10, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
    }
    return Tiny("CosmosTransformer3DModel", model, inputs, (4, 5, 6), 0, False, layers, **VIDEO)


class TinyCosmos3(Tiny):
    """Its text is causal apart; the video sees it as keys alone."""

    def __call__(self, timestep=None, **changed):
        if timestep is not None:
            old = self.inputs["vision_timesteps"]
            changed["vision_timesteps"] = torch.full_like(old, timestep)
        with torch.no_grad():
            return self.model(**{**self.inputs, **changed}, return_dict=False)[0][0]

    def with_text(self, image):
        return torch.nn.functional.pad(
            image, (TEXT, self.references, 0, self.references), value=True
        )


def cosmos3(layers=2, sound=7):
    """Text, the video, whose first frame is given, and sound."""
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=4,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        patch_latent_dim=16,
        vocab_size=20,
        rope_axes_dim=(4, 2, 2),
        sound_dim=3 if sound else None,
        sound_gen=sound > 0,
    )
    positions = [
        torch.arange(TEXT).expand(3, -1),
        TEXT + torch.cartesian_prod(*(torch.arange(n) for n in (4, 5, 6))).T,
        TEXT + torch.arange(sound).expand(3, -1),
    ]
    inputs = {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat(positions, 1),
        "und_len": TEXT,
        "sequence_length": TEXT + 120 + sound,
        "vision_tokens": [torch.randn(1, 4, 4, 10, 12)],
        "vision_token_shapes": [(4, 5, 6)],
        "vision_sequence_indexes": torch.arange(TEXT, TEXT + 120),
        "vision_mse_loss_indexes": torch.arange(TEXT + 30, TEXT + 120),
        "vision_timesteps": torch.full((90,), 700.0),
        "vision_noisy_frame_indexes": [torch.arange(1, 4)],
    }
    if sound:
        rows = torch.arange(TEXT + 120, TEXT + 120 + sound)
        inputs |= {
            "sound_tokens": [torch.randn(3, sound)],
            "sound_token_shapes": [(sound, 1, 1)],
            "sound_sequence_indexes": rows,
            "sound_mse_loss_indexes": rows,
            "sound_timesteps": torch.full((sound,), 700.0),
            "sound_noisy_frame_indexes": [torch.arange(sound)],
        }
    made = TinyCosmos3("Cosmos3OmniTransformer", model, inputs, (4, 5, 6), 0, True, layers, **VIDEO)
    made.references = sound
    return made


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


def kandinsky6(layers=2):
    model = diffusers.Kandinsky6Transformer3DModel(
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
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 10, 12, 4),
        "audio_hidden_states": torch.randn(BATCH, 7, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
        "pooled_projections": torch.randn(BATCH, 6),
    }
    name = "Kandinsky6Transformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), 0, False, layers, **VIDEO)


def framepack(layers=1, lengths=(TEXT, TEXT)):
    """History in three scales before the video; an image and text behind it."""
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
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
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    batch = len(lengths)

    def latents(frames):
        return torch.randn(batch, 4, frames, 10, 12)

    def indices(first, frames):
        return torch.arange(first, first + frames)

    inputs = {
        "hidden_states": latents(4),
        "indices_latents": indices(9, 4),
        "latents_clean": latents(2),
        "indices_latents_clean": indices(7, 2),
        "latents_history_2x": latents(2),
        "indices_latents_history_2x": indices(5, 2),
        "latents_history_4x": latents(5),
        "indices_latents_history_4x": indices(0, 5),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).long(),
        "pooled_projections": torch.randn(batch, 6),
        "image_embeds": torch.randn(batch, 3, 8),
        "timestep": torch.full((batch,), 700),
    }
    name = "HunyuanVideoFramepackTransformer3DModel"
    history = 2 * 30 + 1 * 3 * 3 + 2 * 2 * 2
    made = Tiny(name, model, inputs, (4, 5, 6), history, True, 2 * layers, **VIDEO)
    made.references = 3 + (TEXT if batch > 1 else lengths[0])
    return made


def helios(layers=2, **config):
    """History in three scales before the video."""
    model = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_dim=(4, 6, 6),
        **config,
    )

    def latents(frames):
        return torch.randn(BATCH, 4, frames, 10, 12)

    def indices(first, frames):
        return torch.arange(first, first + frames).expand(BATCH, -1)

    inputs = {
        "hidden_states": latents(4),
        "indices_hidden_states": indices(9, 4),
        "latents_history_short": latents(2),
        "indices_latents_history_short": indices(7, 2),
        "latents_history_mid": latents(2),
        "indices_latents_history_mid": indices(5, 2),
        "latents_history_long": latents(5),
        "indices_latents_history_long": indices(0, 5),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "timestep": torch.full((BATCH,), 700),
    }
    history = 2 * 30 + 1 * 3 * 3 + 2 * 2 * 2
    name = "HeliosTransformer3DModel"
    return Tiny(name, model, inputs, (4, 5, 6), history, True, layers, **VIDEO)


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
