"""What the bridge to diffusers refuses, and that it changes nothing when it does."""

import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from tiny_diffusion import MAKERS, make

import sparse_fmha
from sparse_fmha.integrations import diffusers as sparse


@pytest.fixture
def wan():
    return make("wan")


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize(
    "other", [torch.nn.Linear(8, 8), object(), None], ids=["module", "object", "None"]
)
def test_other_models(other):
    with pytest.raises(TypeError, match=r"model must be .*Flux"):
        sparse.enable(other, "dense")


def test_a_class_of_the_same_name_elsewhere():
    other = type("WanTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(TypeError, match=r"model must be one of \['FluxTransformer2DModel',"):
        sparse.enable(other, "dense")


@pytest.mark.parametrize(
    ("error", "match", "method", "options"),
    [
        (
            TypeError,
            r"method must be one of \['neighborhood', 'block_sparse', 'dense',.*, got",
            3,
            {},
        ),
        (
            ValueError,
            r"method must be one of \['neighborhood', 'block_sparse', 'dense',.*, got",
            "sliding",
            {},
        ),
        (
            TypeError,
            "window must be given for method 'neighborhood'",
            "neighborhood",
            {},
        ),
        (
            TypeError,
            r"options of method 'dense' must be among \[\], got 'window'",
            "dense",
            {"window": 3},
        ),
        (
            TypeError,
            r"options of method 'neighborhood' must be among \['window', 'stride',",
            "neighborhood",
            {"mask": None},
        ),
        (
            TypeError,
            "window must be an int or a tuple of them, got 2.5",
            "neighborhood",
            {"window": 2.5},
        ),
        (
            TypeError,
            "stride must be an int or a tuple of them, got 'a'",
            "neighborhood",
            {"window": 3, "stride": "a"},
        ),
        (
            ValueError,
            "window must have one entry for each of the 3 axes of the grid of",
            "neighborhood",
            {"window": (3, 3)},
        ),
        (
            ValueError,
            "dilation must have one entry for each of the 3 axes of the grid of",
            "neighborhood",
            {"window": 3, "dilation": (1,)},
        ),
        (
            TypeError,
            "mask must be a BlockMask or a function",
            "block_sparse",
            {"mask": torch.ones(1)},
        ),
        (
            TypeError,
            "mask must be given for method 'block_sparse'",
            "block_sparse",
            {},
        ),
        (
            ValueError,
            "first_dense_steps must be an int, or a share from 0 to 1, got 1.5",
            "dense",
            {"first_dense_steps": 1.5},
        ),
        (
            TypeError,
            "last_dense_steps must be a number of steps or a share of them, got True",
            "dense",
            {"last_dense_steps": True},
        ),
        (
            ValueError,
            "min_tokens must be at least 0, got -1",
            "dense",
            {"min_tokens": -1},
        ),
        (
            ValueError,
            "first_dense_steps must be at least 0, got -1",
            "dense",
            {"first_dense_steps": -1},
        ),
        (TypeError, "dense_layers must be indices of blocks, got 1", "dense", {"dense_layers": 1}),
        (TypeError, "dense_layers must be an int, got 'a'", "dense", {"dense_layers": ["a"]}),
        (
            ValueError,
            "dense_layers must be blocks 0 to 1 of WanTransformer3DModel, got 2",
            "dense",
            {"dense_layers": [0, 2]},
        ),
        (
            ValueError,
            "dense_layers must name each block once, got 1 twice",
            "dense",
            {"dense_layers": [1, 0, 1]},
        ),
        (TypeError, "grid must be the tokens of each axis, got 120", "dense", {"grid": 120}),
        (
            ValueError,
            "grid must have one entry for each of the 3 axes of the grid of",
            "dense",
            {"grid": (4, 30)},
        ),
    ],
)
def test_arguments(wan, error, match, method, options):
    with pytest.raises(error, match=match):
        sparse.enable(wan.model, method, **options)
    assert not hooks(wan.model)
    assert not sparse.is_enabled(wan.model)


def test_disable_before_enable(wan):
    with pytest.raises(
        RuntimeError, match=r"WanTransformer3DModel must be enabled before disable\(\); call"
    ):
        sparse.disable(wan.model)


def test_a_pipeline_is_enabled_as_a_whole_or_not(wan):
    class Pipeline:
        transformer = wan.model
        transformer_2 = make("wan", layers=1).model

    with pytest.raises(
        ValueError, match="dense_layers must be blocks 0 to 0 of WanTransformer3DModel, got 1"
    ):
        sparse.enable(Pipeline(), "dense", dense_layers=[1])
    assert not hooks(wan.model)


@pytest.mark.parametrize("name", MAKERS)
def test_grid_that_is_not_the_tokens(name):
    tiny = make(name)
    sparse.enable(tiny.model, "neighborhood", window=2, grid=(2,) * len(tiny.grid))
    tokens = tiny.image + tiny.text
    with pytest.raises(
        ValueError,
        match=f"queries of the self-attention of {tiny.name} must match .* 2x2.*, got {tokens}",
    ):
        tiny()


@pytest.mark.parametrize("name", MAKERS)
def test_window_larger_than_the_grid(name):
    tiny = make(name)
    window = (*tiny.grid[:-1], tiny.grid[-1] + 1)
    sparse.enable(tiny.model, "neighborhood", window=window)
    with pytest.raises(
        ValueError, match=rf"window\[.\] \* dilation.* on the grid \({tiny.grid[0]}, "
    ):
        tiny()
    sparse.disable(tiny.model)
    tiny()


@pytest.mark.parametrize("option", ["window", "stride", "dilation"])
def test_options_on_an_axis_of_one_token(option):
    tiny = make("wan", frames=1)
    options = {"window": (1, 3, 3), option: (2, 3, 1)}
    sparse.enable(tiny.model, "neighborhood", **options)
    with pytest.raises(
        ValueError, match=rf"{option}\[0\] must be 1 on the grid .*, got \(2, 3, 1\)"
    ):
        tiny()


def test_masks_of_another_length_or_type(wan):
    blocks = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    mask = sparse_fmha.BlockMask.from_blocks(blocks, 64, 64, 64, 64)
    sparse.enable(wan.model, "block_sparse", mask=mask)
    with pytest.raises(
        ValueError, match="mask must be for the tokens of the grid: the grid 4x5x6 has 120 tokens,"
    ):
        wan()
    sparse.disable(wan.model)
    sparse.enable(wan.model, "block_sparse", mask=lambda q, k: q)
    with pytest.raises(TypeError, match=r"mask\(q, k\) must return a BlockMask, got Tensor"):
        wan()


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (
            torch.zeros(2, 1, 1, 109),
            r"attn_mask must be a mask of padded text keys, bool \[B, 1, 1, 109\],",
        ),
        (
            torch.ones(2, 1, 109, 109, dtype=torch.bool),
            r"attn_mask must be a mask of padded text keys, bool \[B, 1, 1, 109\],",
        ),
        (
            torch.ones(2, 1, 1, 99, dtype=torch.bool),
            r"attn_mask must be a mask of padded text keys, bool \[B, 1, 1, 109\],",
        ),
        (torch.arange(109).expand(2, 1, 1, 109) < 60, "hides image tokens"),
    ],
    ids=["additive", "pairs", "short", "image"],
)
def test_other_attention_masks(mask, match):
    tiny = make("flux")
    sparse.enable(tiny.model, "neighborhood", window=3)
    with pytest.raises(NotImplementedError, match=match):
        tiny(joint_attention_kwargs={"attention_mask": mask})


@pytest.mark.parametrize("hidden", [range(6, 10), range(3), (0, 4, 5, 9), range(10)], ids=str)
def test_padded_text_before_the_image(hidden):
    """Right, left, both with a gap, and all of it."""
    tiny = make("flux")
    mask = torch.ones(109, dtype=torch.bool)
    mask[list(hidden)] = False
    given = {"joint_attention_kwargs": {"attention_mask": mask.expand(2, 1, 1, 109)}}
    expected = tiny(**given)
    sparse.enable(tiny.model, "neighborhood", window=tiny.grid)
    torch.testing.assert_close(tiny(**given), expected, rtol=1e-4, atol=1e-4)


def test_sizes_of_several_images():
    tiny = make("qwen_image")
    sparse.enable(tiny.model, "dense")
    for shapes in ([[(1, 9, 11)], [(1, 11, 9)]], [[(3, 3, 11)]] * 2):
        with pytest.raises(ValueError, match="img_shapes must be those of one image and its ref"):
            tiny(img_shapes=shapes)


def test_calls_that_show_no_grid():
    tiny = make("ltx")
    given = {
        **dict.fromkeys(("num_frames", "height", "width")),
        "video_coords": torch.ones(2, 3, 120),
    }
    expected = tiny(**given)
    sparse.enable(tiny.model, "neighborhood", window=tiny.grid)
    with pytest.raises(
        ValueError,
        match="num_frames, height and width must be given, because video_coords shows no",
    ):
        tiny(**given)
    sparse.disable(tiny.model)
    sparse.enable(tiny.model, "neighborhood", window=tiny.grid, grid=tiny.grid)
    torch.testing.assert_close(tiny(**given), expected, rtol=1e-4, atol=1e-4)


def test_positions_of_several_images():
    tiny = make("flux")
    ids = tiny.inputs["img_ids"].clone()
    ids[50:, 0] = 1  # in the middle of a row
    sparse.enable(tiny.model, "dense")
    for changed, count in ((ids, 50), (tiny.inputs["img_ids"].flip(0), 99)):
        with pytest.raises(ValueError, match=f"img_ids must be those of one image.*{count} tokens"):
            tiny(img_ids=changed)


def test_processors_of_others():
    tiny = make("flux")
    block = tiny.model.transformer_blocks[0].attn
    block.set_processor(FluxIPAdapterAttnProcessor(32, 12))
    with pytest.raises(
        NotImplementedError,
        match="the attention processor of block 0 of FluxTransformer2DModel must be",
    ):
        sparse.enable(tiny.model, "dense")


def test_processor_replaced_after_enable(wan):
    sparse.enable(wan.model, "dense")
    layer = wan.model.blocks[1].attn1
    layer.set_processor(type(layer.processor)())
    with pytest.raises(
        RuntimeError, match="the attention processor of block 1 of WanTransformer3DModel must not"
    ):
        wan()


def test_context_parallelism_of_other_kinds(wan):
    """Ring attention, and models without a plan of diffusers whose attention has text."""
    sparse.enable(wan.model, "dense")
    config = types.SimpleNamespace(ring_degree=2, ulysses_degree=1)
    given = types.SimpleNamespace(context_parallel_config=config)
    for block in wan.model.blocks:  # as `enable_parallelism` does
        block.attn1.processor._parallel_config = given
    with pytest.raises(NotImplementedError, match=r"of WanTransformer3DModel is .* as Ulysses"):
        wan()
    config.ring_degree = 1
    tiny = make("hunyuan_video")
    sparse.enable(tiny.model, "dense")
    for block in tiny.model.transformer_blocks:
        block.attn.processor._parallel_config = given
    with pytest.raises(NotImplementedError, match=r"HunyuanVideo.*which diffusers has no plan for"):
        tiny()
    tiny = make("cogvideox")
    sparse.enable(tiny.model, "dense")
    for block in tiny.model.transformer_blocks:
        block.attn1.processor._parallel_config = given
    with pytest.raises(NotImplementedError, match="CogVideoX"):
        tiny()


def test_an_error_leaves_the_model_usable(wan):
    expected = wan()
    sparse.enable(wan.model, "neighborhood", window=wan.grid)
    with pytest.raises(RuntimeError):
        wan(encoder_hidden_states=torch.randn(2, 10, 7))
    torch.testing.assert_close(wan(), expected, rtol=1e-4, atol=1e-4)


def test_the_package_does_not_import_diffusers():
    code = "import sys, sparse_fmha.integrations; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
