"""Presets of the bridge to diffusers: each loads, says where it is from, and runs."""

import dataclasses
import json

import pytest
import tiny_diffusion
import torch

pytest.importorskip("diffusers.models.transformers.transformer_kandinsky6")  # the newest of them

import tiny_diffusion_models

from sparse_fmha.integrations import _diffusion_presets, _diffusion_table
from sparse_fmha.integrations import diffusers as sparse

KNOWN = [path.stem for path in sorted(_diffusion_presets.FOLDER.glob("*.json"))]
TINY = {
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan_vace",
    "WanAnimateTransformer3DModel": "wan_animate",
    "SkyReelsV2Transformer3DModel": "skyreels",
    "ChronoEditTransformer3DModel": "chronoedit",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video_15",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "z_image",
    "CosmosTransformer3DModel": "cosmos",
    "LTX2VideoTransformer3DModel": "ltx2",
    "MiniMaxH3Transformer3DModel": "minimax_h3",
    "Kandinsky5Transformer3DModel": "kandinsky5",
}
# What the grid of a tiny model is too small for.
SMALL = {
    "neighborhood": {"window": 2, "stride": 1},
    "sliding_tile": {"tile": (2, 5, 3), "window": (1, 1, 2)},
    "radial": {"block": 64},
    "svg": {"keep": 1.0, "block": 64},
    "nabla": {"window": (3, 1, 1)},
}


def tiny_of(preset):
    """By name; with its different layers one after another, in windows that are small enough."""
    if not preset.layers:
        return preset.name
    kinds = {json.dumps(each): each for each in preset.layers.values()}.values()
    layers = {f"layer {n}": each for n, each in enumerate(kinds)}
    for key, each in layers.items():
        if each is not None:
            window = [min(w, n) for w, n in zip(each["window"], (-1, 2, 3), strict=True)]
            layers[key] = {"method": each["method"], "window": window}
    return dataclasses.replace(preset, layers=layers)


@pytest.mark.parametrize("name", KNOWN)
def test_each_runs_on_a_tiny_model(name):
    preset = _diffusion_presets.find(name)
    for model in preset.models:
        maker = TINY[model]
        found = tiny_diffusion if maker in tiny_diffusion.MAKERS else tiny_diffusion_models
        tiny = found.make(maker, **({"layers": 6} if preset.layers else {}))
        assert (preset in sparse.presets(tiny.model)) == (not preset.layers)  # the tiny has few
        expected = tiny()
        with sparse.Request(5):
            small, options = tiny_of(preset), SMALL.get(preset.method, {})
            options = {"min_tokens": 0, **options}
            sparse.enable(tiny.model, preset=small, first_dense_steps=0, **options)
            assert tiny().isfinite().all()
            assert not tiny().equal(expected)
            sparse.disable(tiny.model)
            sparse.enable(tiny.model, preset=small, **options)
            assert tiny().equal(expected) == (preset.first_dense_steps > 0)


@pytest.mark.parametrize("name", KNOWN)
def test_each_says_where_it_is_from(name):
    preset = _diffusion_presets.find(name)
    assert preset.source
    assert preset.figure == "no figure published" or any(c.isdigit() for c in preset.figure)
    assert set(preset.models) <= set(sparse.supported_models())
    assert preset.steps is None or preset.first_dense_steps < preset.steps
    if preset.method is not None:
        _diffusion_table.make(preset.method, preset.options)
    if preset.grid is not None:
        assert preset.fits(preset.grid)
    given = json.loads((_diffusion_presets.FOLDER / f"{name}.json").read_text())
    assert given.keys() <= set(_diffusion_presets.Preset.__dataclass_fields__)


@pytest.mark.parametrize(("size", "blocks"), [("2b", 28), ("14b", 36)])
def test_layers_of_cosmos(size, blocks):
    """Each block has a window of the source's, in frames of 44 x 80 tokens, or is dense."""
    preset = _diffusion_presets.find(f"natten-cosmos-predict2-{size}")
    assert preset.fits((24, 44, 80))
    assert not preset.fits((24, 40, 80))
    with torch.device("meta"):
        model = tiny_diffusion_models.tiny_videos.cosmos(layers=blocks).model
    sparse.enable(model, preset=preset)
    listed = {p.name for p in sparse.presets(model) if p.layers}
    assert listed == {preset.name}  # the other one is for a model with other layers
    kinds = [type(block.attn1.processor).__name__ for block in model.transformer_blocks]
    assert len({id(block.attn1.processor) for block in model.transformer_blocks}) <= 6 + 1
    assert kinds.count("CosmosAttnProcessor2_0") == (size == "14b")


def test_those_for_a_model_and_grid():
    names = [preset.name for preset in sparse.presets()]
    assert names == KNOWN
    tiny = tiny_diffusion.make("flux")
    found = [preset.name for preset in sparse.presets(tiny.model)]
    assert found == ["gna-flux-4k", "sol-comfyui"]
    assert not sparse.presets(tiny.model, grid=(64, 64))
    assert len(sparse.presets(tiny.model, grid=(128, 96))) == 2
    assert [p.name for p in sparse.presets(tiny.model, grid=(76, 200))] == ["sol-comfyui"]
    assert sparse.presets(tiny_diffusion.make("ltx").model) == []


def test_min_tokens_of_a_preset():
    """Also for images, of which calls have none otherwise."""
    tiny = tiny_diffusion.make("flux")
    expected = tiny()
    options = {"first_dense_steps": 0}
    sparse.enable(tiny.model, preset="sol-comfyui", **options)
    with pytest.warns(UserWarning, match="109 tokens are fewer than min_tokens = 12288"):
        assert tiny().equal(expected)
    sparse.disable(tiny.model)
    sparse.enable(tiny.model, preset="sol-comfyui", min_tokens=109, **options)
    assert not tiny().equal(expected)


def test_what_is_given_replaces_the_preset():
    tiny = tiny_diffusion.make("wan")
    torch.manual_seed(0)
    sparse.enable(
        tiny.model, preset="radial-wan", decay=1.0, first_dense_steps=1, dense_layers=(), block=64
    )
    tiny(900)
    found = tiny(700)
    sparse.disable(tiny.model)
    sparse.enable(tiny.model, "radial", decay=1.0, block=64)
    assert found.equal(tiny(700))


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (ValueError, "preset must be one of .*, got 'none'", {"preset": "none"}),
        (
            ValueError,
            "preset 'gna-flux-4k' is for FluxTransformer2DModel, got Wan",
            {"preset": "gna-flux-4k"},
        ),
        (
            ValueError,
            "method must not be given beside preset = 'radial-wan', got 'sol'",
            {"preset": "radial-wan", "method": "sol"},
        ),
        (TypeError, "method, layers or preset must be given", {}),
        (TypeError, "options of method 'radial' must be among", {"preset": "radial-wan", "tau": 1}),
    ],
)
def test_arguments(error, match, given):
    tiny = tiny_diffusion.make("wan")
    with pytest.raises(error, match=match):
        sparse.enable(tiny.model, **given)
    assert not sparse.is_enabled(tiny.model)
