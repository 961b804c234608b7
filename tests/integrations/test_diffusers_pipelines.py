"""Whole pipelines, with random weights and given prompt embeddings."""

import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    WanPipeline,
)
from tiny_diffusion import make

from sparse_fmha.integrations import diffusers as sparse

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def wan():
    """With guidance: two calls of the transformer in a step."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae}
    prompt = {"negative_prompt_embeds": torch.zeros(1, 10, 12), "num_frames": 13}
    return WanPipeline, make("wan"), parts, {"height": 80, "width": 96, **prompt}


def flux():
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=2, norm_num_groups=1)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    sizes = {"height": 18, "width": 22, "pooled_prompt_embeds": torch.ones(1, 6)}
    return FluxPipeline, make("flux"), {"vae": vae, **dict.fromkeys(names)}, sizes


@pytest.mark.parametrize("kind", [wan, flux])
def test_pipeline(kind):
    cls, tiny, parts, given = kind()
    pipe = cls(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny.model, **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(1, 10, 12)

    def sample():
        generator = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        return pipe(prompt_embeds=prompt, generator=generator, **options, **given)[0]

    expected = sample()
    sparse.enable(pipe, "neighborhood", window=tiny.grid)
    torch.testing.assert_close(sample(), expected, rtol=1e-3, atol=1e-3)
    sparse.disable(pipe)
    errors = []
    for dense in range(STEPS + 1):
        sparse.enable(pipe, "neighborhood", window=tiny.window, first_dense_steps=dense)
        out = sample()
        assert sample().equal(out)  # the next run begins dense again
        errors.append((out - expected).abs().max().item())
        sparse.disable(pipe)
    assert errors[0] > 1e-1
    assert all(error > 0 for error in errors[:-1])
    assert errors[-1] == 0
    assert sample().equal(expected)


@pytest.mark.parametrize("kind", [wan, flux])
@pytest.mark.parametrize("inside", ["a thread", "a step"])
def test_pipelines_that_share_a_transformer_take_turns(kind, inside):
    """A run in another thread, or inside a step of the first: each has its own dense steps."""
    cls, tiny, parts, given = kind()
    pipes = [
        cls(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny.model, **parts)
        for _ in range(2)
    ]
    prompts, steps = torch.randn(2, 1, 1, 10, 12).unbind(), (STEPS, STEPS + 3)
    prompts = [prompt[0].clone() for prompt in prompts]
    guidance = "negative_prompt_embeds"

    def sample(i, after=None):
        options = {"output_type": "latent", "return_dict": False, "num_inference_steps": steps[i]}
        if guidance in given:
            options[guidance] = given[guidance].clone()
        if after is not None:
            options["callback_on_step_end"] = after
        pipes[i].set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(i)
        return pipes[i](**{**given, **options}, prompt_embeds=prompts[i], generator=generator)[0]

    sparse.enable(pipes[0], "neighborhood", window=tiny.window, first_dense_steps=2)
    assert sparse.is_enabled(pipes[1])
    expected = [sample(i) for i in range(2)]
    out = [None, None]

    def other(pipe, step, timestep, tensors):
        def run():
            out[1] = sample(1)

        if step == 1:
            if inside == "a thread":
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()
            else:
                run()
        return tensors

    out[0] = sample(0, after=other)
    sparse.disable(pipes[1])
    assert out[0].equal(expected[0])
    assert out[1].equal(expected[1])
    assert not sample(0).equal(expected[0])


def test_example(capsys, monkeypatch):
    arguments = ["video_model.py", "--grid", "4", "8", "8", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "examples" / "video_model.py"), run_name="__main__")
    assert done.value.code == 0
    _, _, dense, whole, half, quarter = capsys.readouterr().out.splitlines()
    errors = [float(line.split()[-1]) for line in (whole, half, quarter)]
    assert dense.split()[-3] == "256"
    assert errors[0] < 1e-5 < errors[1] < errors[2]
