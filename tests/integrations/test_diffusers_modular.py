"""MiniMax-H3, which diffusers has as a modular pipeline alone, with random weights."""

import pytest
import torch

pytest.importorskip("diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3")

import diffusers
from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as blocks
from tiny_diffusion import TEXT, Tiny, sharpen

from sparse_fmha.integrations import diffusers as sparse

GRID = (37, 2, 3)  # of 124 frames of 64x96 pixels


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2,
        num_refiner_layers=1, ffn_dim=32, in_channels=24, audio_in_channels=32, text_dim=12,
        freq_dim=8, time_embed_hidden_dim=16, time_embed_dim=8, rope_freq_dim=2,
    )  # fmt: skip
    sharpen(Tiny("MiniMaxH3Transformer3DModel", model, {}, GRID, TEXT))
    pipe = blocks.MiniMaxH3CoreDenoiseStep().init_pipeline()
    shifts = {"scheduler": 12.0, "audio_scheduler": 3.0}
    schedulers = {name: diffusers.MiniMaxH3Scheduler(shift=x) for name, x in shifts.items()}
    pipe.update_components(transformer=model, **schedulers)
    return pipe


def sample(pipe):
    """Three calls of the transformer."""
    return pipe(
        prompt_embeds=torch.randn(1, TEXT, 12, generator=torch.Generator().manual_seed(0)),
        text_token_tags=torch.ones(TEXT, dtype=torch.long),
        height=64, width=96, num_frames=124, num_inference_steps=4,
        generator=torch.Generator().manual_seed(1), output="latents",
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense(pipe):
    return sample(pipe)


def test_the_whole_grid(pipe, dense):
    sparse.enable(pipe, "neighborhood", window=(-1, -1, -1))
    torch.testing.assert_close(sample(pipe), dense, rtol=1e-4, atol=1e-5)
    sparse.disable(pipe)
    assert sample(pipe).equal(dense)


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 0), ({"first_dense_steps": 0.34}, 2), ({"last_dense_steps": 1}, 1),
     ({"first_dense_steps": 2, "last_dense_steps": 0.1}, 3)],
)  # fmt: skip
def test_steps_of_its_schedule(pipe, dense, monkeypatch, options, kept):
    """Their number is read from the first of its two schedulers."""
    found, place = [], sparse.Steps.place
    monkeypatch.setattr(
        sparse.Steps, "place", lambda *given: (found.append(place(*given)), found[-1])[1]
    )
    sparse.enable(pipe, "neighborhood", window=(9, 2, 2), **options)
    assert sample(pipe).equal(dense) == (kept == 3)
    sparse.disable(pipe)
    assert [is_dense for is_dense, _ in found].count(True) == kept
    assert len(found) == 3


def test_presets(pipe, dense):
    names = [preset.name for preset in sparse.presets(pipe)]
    assert names == ["cube-minimax-h3", "sol-comfyui", "subblock-minimax-h3"]
    sparse.enable(pipe, preset="sol-comfyui", min_tokens=0)
    assert not sample(pipe).equal(dense)
    sparse.disable(pipe)
