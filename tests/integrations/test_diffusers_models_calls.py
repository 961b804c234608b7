"""What is special in some models of diffusers: references, audio, masks and times of their own."""

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers.models.transformers.transformer_kandinsky6")  # the newest of them

import tiny_diffusion
from tiny_diffusion import BATCH, torch_attention_with
from tiny_diffusion_models import all_blocks, close, differs, make
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_fmha.integrations import diffusers as sparse


class Largest(TorchDispatchMode):
    """The most elements of a tensor of bools."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self.found = max(self.found, out.numel())
        return out


@pytest.mark.parametrize("method", ["dense", "neighborhood"])
def test_hunyuan_video_15_makes_no_mask_of_pairs(method):
    tiny = make("hunyuan_video_15")
    pairs = BATCH * (tiny.image + tiny.text) ** 2
    with Largest() as original:
        expected = tiny()
    assert original.found == pairs
    sparse.enable(tiny.model, method, **({"window": tiny.grid} if method != "dense" else {}))
    with Largest() as ours:
        out = tiny()
    close(out, expected)
    assert ours.found < pairs / 50


def with_references(name):
    """Models that edit images, with the latents of one or two references."""
    if name == "flux2":
        return make(name, references=2)
    tiny = tiny_diffusion.make(name)
    latents = torch.cat([tiny.inputs["hidden_states"], torch.randn(BATCH, 12, 8)], 1)
    tiny.inputs["hidden_states"] = latents
    if name == "flux":  # Kontext
        ids = torch.cartesian_prod(torch.ones(1), torch.arange(3.0), torch.arange(4.0))
        tiny.inputs["img_ids"] = torch.cat([tiny.inputs["img_ids"], ids])
    else:
        tiny.inputs["img_shapes"] = [[(1, 9, 11), (1, 3, 4)]] * BATCH
    return dataclasses.replace(tiny, references=12)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
@pytest.mark.parametrize("method", ["neighborhood", "block_sparse", "dense"])
def test_references(name, method):
    """They are seen by all and see all, as the text is."""
    tiny = with_references(name)
    dense = tiny()
    options, expected = {"mask": all_blocks} if method == "block_sparse" else {}, dense
    if method == "neighborhood":
        options = tiny.options
        with torch_attention_with(tiny.visible(**options)) as seen:
            expected = tiny()
        assert len(seen) == tiny.layers
        differs(expected, dense)
    sparse.enable(tiny.model, method, **options)
    close(tiny(), expected)


def test_audio_of_ltx2_is_not_on_the_grid():
    """Only attn1 of each block is replaced."""
    tiny = make("ltx2")
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    chosen = [
        name
        for name, processor in tiny.model.attn_processors.items()
        if processor._attention_backend == "sparse_fmha"
    ]
    assert chosen == [f"transformer_blocks.{i}.attn1.processor" for i in range(tiny.layers)]


def test_perturbed_attention_of_ltx2():
    """Blocks of spatio-temporal guidance skip attention; the others keep their windows."""
    tiny = make("ltx2", perturbed_attn=True)
    given = {"spatio_temporal_guidance_blocks": [1]}
    with torch_attention_with(tiny.visible(tiny.window)) as seen:
        expected = tiny(**given)
    assert len(seen) == 1
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    close(tiny(**given), expected)


def test_cosmos_by_the_name_of_a_backend():
    tiny = make("cosmos")
    expected = tiny()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    differs(tiny(), expected)
    for block in tiny.model.transformer_blocks:
        block.attn1.processor._attention_backend = "native"
    close(tiny(), expected)


def test_cosmos_25():
    """Its text and image are in a cross-attention of their own kind, given frames have another
    time, and Transfer's controlnet adds to blocks."""
    tiny = make(
        "cosmos",
        img_context_dim_in=6,
        img_context_dim_out=32,
        img_context_num_tokens=3,
        controlnet_block_every_n=1,
    )
    words = tiny.inputs["encoder_hidden_states"]
    states = words, torch.randn(BATCH, 3, 6)
    added = [torch.randn(BATCH, 120, 32)] * 2

    def call(time):
        given = {**tiny.inputs, "encoder_hidden_states": states}
        given["timestep"] = torch.tensor([0.1, time, time, time]).expand(BATCH, -1)[
            :, None, :, None, None
        ]
        with torch.no_grad():
            return tiny.model(**given, block_controlnet_hidden_states=added, return_dict=False)[0]

    expected = [call(700.0), call(500.0)]
    with torch_attention_with(tiny.visible(tiny.window)) as seen:
        window = call(500.0)
    assert len(seen) == tiny.layers
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=1)
    assert call(700.0).equal(expected[0])
    close(call(500.0), window)
    differs(window, expected[1])


@pytest.mark.parametrize("sound", [0, 7])
def test_text_of_cosmos3_stays_causal(sound):
    """Also without sound behind the video."""
    tiny = make("cosmos3", sound=sound)
    expected = tiny()
    sparse.enable(tiny.model, "dense")
    close(tiny(), expected)
    sparse.enable(tiny.model, "cube_top_k", keep=1.0)
    close(tiny(), expected)


def test_own_sparse_attention_of_kandinsky5(monkeypatch):
    """NABLA hands over a BlockMask; by the name of the backend alone it needs no FlexAttention."""
    from diffusers.models.transformers import transformer_kandinsky as module

    tiny = make("kandinsky5")
    near = torch.eye(8, dtype=torch.bool)[None, None]  # blocks of 8x8 tokens of a frame
    given = {
        "hidden_states": torch.randn(1, 4, 16, 32, 4),
        "visual_rope_pos": [torch.arange(n) for n in (4, 8, 16)],
        "sparse_params": {"to_fractal": True, "sta_mask": near, "P": 0.5},
    }
    own, densities = module.nablaT_v2, []

    def pairs(*args, **options):
        blocks = own(*args, **options).to_dense().bool()
        densities.append(blocks.float().mean())
        return blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)

    with monkeypatch.context() as patch:
        patch.setattr(module, "nablaT_v2", pairs)
        expected = tiny(**given)
    assert all(0.1 < density < 0.9 for density in densities)
    for block in tiny.model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = "sparse_fmha"
    close(tiny(**given), expected, "kandinsky5")


@pytest.mark.parametrize("keyframes", [0, 2])
def test_keyframes_of_minimax_h3(keyframes):
    """They are seen by all and see all; the tiny model of the other tests has one."""
    tiny = make("minimax_h3", keyframes=keyframes)
    with torch_attention_with(tiny.visible(tiny.window)) as seen:
        expected = tiny()
    assert len(seen) == tiny.layers
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    close(tiny(), expected)


@pytest.mark.parametrize("change", ["keyframe beside it", "rows in another order", "one place"])
def test_rows_of_minimax_h3_that_are_not_one_video(change):
    tiny = make("minimax_h3")
    ids = tiny.inputs["position_ids"].clone()
    if change == "keyframe beside it":
        changed = {"video_indices": torch.arange(10, 174)[-150:]}
    else:
        ids[-120:] = ids[-120:].flip(0) if "order" in change else 1.0
        changed = {"position_ids": ids}
    sparse.enable(tiny.model, "dense")
    with pytest.raises(ValueError, match=r"position_ids of the last .* must be those of one video"):
        tiny(**changed)
