"""More models of diffusers: a few tests for each row."""

import importlib.util
import re

import pages
import pytest
import torch

pytest.importorskip("diffusers.models.transformers.transformer_kandinsky6")  # the newest of them

import tiny_diffusion
from tiny_diffusion import TEXT, torch_attention_with
from tiny_diffusion_models import MORE, all_blocks, close, differs, make

from sparse_fmha import reference
from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_models import MODELS

MADE = "What is replaced"  # from there on tables are generated


def masks(tiny, **options):
    """Of the whole self-attention, and of the grid alone (Stable Diffusion 3.5)."""
    return tiny.visible(**options), reference.neighborhood_mask(tiny.grid, **options)


def processors(model):
    found = {name: getattr(m, "processor", None) for name, m in model.named_modules()}
    return {name: processor for name, processor in found.items() if processor is not None}


def test_all_supported_models_are_tested():
    made = [make(name).name for name in MORE]
    made += [tiny_diffusion.make(name).name for name in tiny_diffusion.MAKERS]
    assert sorted(made) == sorted(sparse.supported_models())


def test_the_docs_have_all_rows():
    page = (pages.ROOT / "docs" / "integrations_diffusers.md").read_text().partition(MADE)[0]
    rows = re.findall(
        r"^\| `(\w+3DModel|\w+2DModel|\w+Transformer)` \| ([^|]+) \|", page, re.MULTILINE
    )
    axes = {name: len(grid.split(";")[0].split(",")) for name, grid in rows}
    assert axes == {name: row.axes for name, row in MODELS.items()}


def test_the_table_of_the_docs_is_generated():
    spec = importlib.util.spec_from_file_location("made", pages.ROOT / "tools/support_table.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.written(page) == page
    assert tool.table().count("\n") == 2 + len(MODELS)
    with pytest.raises(ValueError, match="the page must have one table"):
        tool.written("")


@pytest.mark.parametrize("name", MORE)
def test_window(name):
    """The whole grid is the original; a window with stride and dilation is masked attention."""
    tiny = make(name)
    dense = tiny()
    with torch_attention_with(*masks(tiny, **tiny.options)) as seen:
        expected = tiny()
    assert len(seen) == tiny.layers
    differs(expected, dense)
    before = processors(tiny.model)
    sparse.enable(tiny.model, "neighborhood", window=tiny.grid)
    whole = tiny()
    assert not whole.equal(dense)  # other kernels ran
    close(whole, dense, name)
    sparse.enable(tiny.model, "neighborhood", **tiny.options)
    close(tiny(), expected, name)
    for _ in range(2):
        sparse.disable(tiny.model)
    assert tiny().equal(dense)
    after = processors(tiny.model)
    assert all(after[key] is before[key] for key in {**before, **after})


@pytest.mark.parametrize("name", MORE)
def test_other_methods_and_dense_steps(name):
    """Two runs of three steps."""
    tiny = make(name)
    times = [900, 500, 100]
    expected = [tiny(t) for t in times]
    sparse.enable(tiny.model, "dense")
    close(tiny(900), expected[0], name)
    sparse.disable(tiny.model)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2)
    for t, dense in zip(times * 2, expected * 2, strict=True):
        if t > 100:
            assert tiny(t).equal(dense)
        else:
            differs(tiny(t), dense)


@pytest.mark.parametrize("name", MORE)
def test_grid_that_is_not_the_tokens(name):
    tiny = make(name)
    sparse.enable(tiny.model, "dense", grid=(2,) * len(tiny.grid))
    with pytest.raises(
        ValueError, match=f"queries of the self-attention of {tiny.name} must match .*2x2"
    ):
        tiny()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("krea2", {"hidden": range(3, 8)}),  # its pipeline pads amid the text
        ("krea2", {"hidden": [0, 4, 9]}),
        ("z_image", {"lengths": (TEXT, 40)}),
        ("hunyuan_video_15", {"image": False, "lengths": (1, TEXT)}),
        ("hunyuan_image", {"lengths": (3, TEXT)}),
        ("hunyuan_image", {"second": False}),
        ("framepack", {"lengths": (3, TEXT)}),
        ("framepack", {"lengths": (4,)}),  # alone, it has no padding
        ("chroma", {"dtype": torch.bool}),  # which hides it
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["neighborhood", "block_sparse"])
def test_padding(name, options, method):
    tiny = make(name, **options)
    if method == "neighborhood":
        chosen, shown = {"window": tiny.window}, tiny.window
    else:
        chosen, shown = {"mask": all_blocks}, tiny.grid
    with torch_attention_with(tiny.visible(shown)):
        expected = tiny()
    sparse.enable(tiny.model, method, **chosen)
    close(tiny(), expected)


@pytest.mark.parametrize(
    ("name", "error", "match", "given"),
    [
        (
            "kandinsky5",
            NotImplementedError,
            "sparse_params must be None, because Kandinsky 5's own",
            {"sparse_params": {"to_fractal": True}},
        ),
        (
            "z_image",
            NotImplementedError,
            "x must be a list of tensors, .* got a list of lists",
            {"x": [[torch.ones(4, 1, 18, 22)] * 2] * 2},
        ),
        (
            "z_image",
            ValueError,
            "x must have images of one size and one frame, got",
            {"x": [torch.ones(4, 1, 18, 22), torch.ones(4, 1, 22, 18)]},
        ),
        (
            "hunyuan_image",
            NotImplementedError,
            "latents of HunyuanImage's refiner",
            {"hidden_states": torch.ones(2, 4, 1, 9, 11)},
        ),
        (
            "krea2",
            ValueError,
            "position_ids must be those of one image, .* got 99 tokens",
            {"position_ids": torch.cat([torch.zeros(TEXT, 3), torch.ones(99, 3)])},
        ),
        (
            "chroma",
            NotImplementedError,
            "attention_mask of Chroma must be 1, or 0 for padding of the text, got other",
            {"attention_mask": torch.cat([torch.ones(2, 100), torch.zeros(2, 9)], 1)},
        ),
        (
            "chroma",
            NotImplementedError,
            "attention_mask of Chroma must be 1, or 0 for padding of the text, got other",
            {"attention_mask": torch.full((2, 109), 0.5)},
        ),
        (
            "chroma",
            NotImplementedError,
            "attention_mask of Chroma must be one of its tokens",
            {"attention_mask": torch.ones(2, 1, 109, 109)},
        ),
        (
            "cosmos3",
            ValueError,
            "vision_token_shapes must be those of one image or video of Cosmos 3, got",
            {"vision_token_shapes": [(2, 5, 6), (2, 5, 6)]},
        ),
        (
            "cosmos3",
            ValueError,
            "vision_sequence_indexes must be the 120 rows behind und_len = 10, got",
            {"vision_sequence_indexes": torch.arange(17, 137)},
        ),
        (
            "ltx2",
            NotImplementedError,
            r"attn_mask must be a mask of padded text keys, bool \[B, 1, 1, 120\],",
            {"video_self_attention_mask": torch.ones(2, 120, 120)},
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 15 else "",
)
def test_what_is_refused(name, error, match, given):
    tiny = make(name)
    sparse.enable(tiny.model, "neighborhood", window=2)
    with pytest.raises(error, match=match):
        tiny(**given)


def test_padding_of_chroma_is_seen_less():
    """It matters, and whether it is a float or a bool, too."""
    tiny = make("chroma")
    seen = tiny.inputs["attention_mask"]
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    less, hidden = tiny(), tiny(attention_mask=seen.bool())
    for other in (hidden, tiny(attention_mask=None)):
        assert (less - other)[1].abs().max() > 1e-3
        close(less[:1], other[:1])  # has no padding


def test_methods_that_chroma_s_padding_is_not_for():
    tiny = make("chroma")
    sparse.enable(tiny.model, "psa")
    with pytest.raises(NotImplementedError, match=r"attention_mask of Chroma, which .* by PSA"):
        tiny()
    assert tiny(attention_mask=None).isfinite().all()


def test_blocks_of_frames_of_skyreels_are_refused():
    tiny = make("skyreels", num_frame_per_block=2)
    sparse.enable(tiny.model, "neighborhood", window=2)
    with pytest.raises(
        NotImplementedError,
        match=r"attn_mask must be a mask of padded text keys, bool \[B, 1, 1, 120\],",
    ):
        tiny()
