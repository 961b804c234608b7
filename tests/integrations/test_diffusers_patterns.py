"""Published methods by name in models of diffusers, against the patterns called directly."""

import contextlib
import copy
import math
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_diffusion import BATCH, TEXT, make

from sparse_fmha import BlockGrid, patterns, reference
from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_table import METHODS

VIDEO, IMAGE = (8, 8, 8), (16, 24)
ONLY_VIDEO = ("radial", "svg", "nabla")
ALL = {  # keeps everything of 4x5x6 tokens
    "sol": {"tau": -1e6},
    "subblock": {"keep": 1.0},
    "cube_top_k": {"keep": 1},
    "vsa": {"keep": 1.0},
    "draft": {"keep": 1.0},
    "rectified": {"keep": 1.0},
    "psa": {"shares": {1: 1.0}},
    "sliding_tile": {"tile": (2, 5, 3), "window": (2, 1, 2)},
    "nabla": {"p": 1.0, "window": None},
}
WHOLE_FRAMES = {  # keeps everything of two frames of whole blocks
    "radial": {"block": 64},
    "svg": {"keep": 1.0, "block": 64},
}
SOME = {
    "sol": {"tau": 0.5},
    "subblock": {"keep": 0.25, "piece": 8},
    "cube_top_k": {"keep": 0.4},
    "vsa": {"keep": 0.3},
    "draft": {"keep": 0.3},
    "rectified": {"keep": 0.2, "theta": 0.1, "block": 64},
    "psa": {"shares": {1: 0.2, 2: 0.5, 8: 0.8}, "similarity": {2: 0.1, 8: 0.05}, "every": 2},
    "sliding_tile": {"tile": (2, 4, 4), "window": (3, 1, 2)},
    "radial": {"decay": 0.2, "first_frame": True, "block": 64},
    "svg": {"keep": 0.5, "rows": 16, "block": 64},
    "nabla": {"p": 0.3, "window": (3, 1, 1), "cube": (1, 8, 8)},
}
OF_IMAGES = {"sliding_tile": {"tile": (4, 8), "window": (3, 1)}}
CUBES = {"cube_top_k": (4, 4, 4), "vsa": (4, 4, 4), "draft": (1, 8, 16), "nabla": (1, 8, 8)}
FLAT = {"cube_top_k": (8, 8), "vsa": (8, 8), "draft": (8, 16)}


def video():
    """HunyuanVideo, whose text is behind the grid and padded in one entry."""
    tiny = make("hunyuan_video", lengths=(3, TEXT))
    tiny.inputs["hidden_states"] = torch.randn(BATCH, 4, 8, 16, 16)
    tiny.grid = VIDEO
    return tiny


def image():
    """Flux, whose text is before the grid."""
    tiny = make("flux")
    ids = torch.cartesian_prod(*(torch.arange(n) for n in IMAGE))
    tiny.inputs["hidden_states"] = torch.randn(BATCH, math.prod(IMAGE), 8)
    tiny.inputs["img_ids"] = torch.nn.functional.pad(ids, (1, 0)).float()
    tiny.grid = IMAGE
    return tiny


def grid_mask(name, q, k, grid, options):
    """Which tokens of the grid see which, bool `[1|B, 1|H, tokens, tokens]`."""
    options = dict(options)
    if name == "sliding_tile":
        window, stride = patterns.sliding_tile(grid, **options)
        return reference.neighborhood_mask(grid, window, stride, 1)
    if name == "radial":
        return patterns.radial(grid[0], math.prod(grid[1:]), **options).to_dense()
    if name == "subblock":
        return patterns.subblock(q, k, **options).to_dense()
    cubes = CUBES if len(grid) == 3 else FLAT
    order = patterns.CubeOrder(grid, options.pop("cube", cubes[name]))
    if name == "vsa":
        count = math.prod(order.cubes)
        options["keep"] = math.ceil(options["keep"] * count) / count
        name = "cube_top_k"
    seen = getattr(patterns, name)(q, k, order, **options).to_dense()
    return seen[:, :, order.slots][..., order.slots]


def direct(name, q, k, v, grid, options, text_first=False):
    """Output of the grid's tokens; those behind them are text, or those before them."""
    n = math.prod(grid)
    text = q.shape[1] - n
    sizes = grid[0], math.prod(grid[1:])
    if text_first:
        assert name == "sol"
        forced = BlockGrid.of(q, k, 64, 64).tokens(0, text)
        return patterns.sol_attention(q, k, v, forced=forced, **options)[:, text:]
    if name == "sol":
        forced = BlockGrid.of(q, k, 64, 64).tokens(-text)
        return patterns.sol_attention(q, k, v, forced=forced, **options)[:, :n]
    if name == "rectified":
        return patterns.rectified_attention(q, k, v, text=text, **options)[:, :n]
    if name == "psa":
        levels = patterns.psa_levels(q, k, text=text, **options)
        return patterns.psa_attention(q, k, v, levels)[:, :n]
    if name == "svg":
        own = {key: value for key, value in options.items() if key != "rows"}
        mask = patterns.svg_mask(*sizes, text=text, **own)
        heads = patterns.svg_heads(q, k, v, mask, *sizes, rows=options["rows"])
        return patterns.svg_attention(q, k, v, mask, *sizes, heads)[:, :n]
    seen = grid_mask(name, q[:, :n], k[:, :n], grid, options)
    seen = torch.nn.functional.pad(seen, (0, text), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q[:, :n], k, v))
    return TORCH(q, k, v, attn_mask=seen).transpose(1, 2)


TORCH = torch.nn.functional.scaled_dot_product_attention


@contextlib.contextmanager
def torch_attention_by(name, tiny, options):
    """torch's attention, with the rows of the grid's tokens by a pattern."""
    n, seen = math.prod(tiny.grid), []
    own = slice(tiny.text, None) if tiny.text_first else slice(n)
    other = slice(tiny.text) if tiny.text_first else slice(n, None)

    def replaced(query, key, value, attn_mask=None, **rest):
        out = TORCH(query, key, value, attn_mask=attn_mask, **rest)
        if query.shape[-2] != n + tiny.text:
            return out
        seen.append(None)
        visible = torch.ones(len(out), tiny.text, dtype=torch.bool)
        if attn_mask is not None:
            visible = attn_mask.expand(BATCH, 1, -1, -1)[:, 0, 0, other]
        as_it_is = name == "sol" and tiny.text_first and bool(visible.all())
        for entry, kept in enumerate(visible):
            # Text first becomes text after the grid, as patterns have it.
            rows = [
                (x if as_it_is else torch.cat([x[own], x[other][kept]]))[None]
                for x in (t[entry].transpose(0, 1) for t in (query, key, value))
            ]
            found = direct(name, *rows, tiny.grid, options, as_it_is)
            out[entry, :, own] = found[0].transpose(0, 1)
        return out

    torch.nn.functional.scaled_dot_product_attention = replaced
    try:
        yield seen
    finally:
        torch.nn.functional.scaled_dot_product_attention = TORCH


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_each_method_is_tested():
    assert (
        ALL.keys() | WHOLE_FRAMES.keys()
        == SOME.keys()
        == METHODS.keys() - {"neighborhood", "block_sparse", "dense", "skip"}
    )


@pytest.mark.filterwarnings("ignore:.*no effect")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("model", ["wan", "cogvideox"])
def test_what_keeps_everything_is_the_original(model, name):
    """Without text, and with text before the grid."""
    tiny = make(model)
    expected = tiny()
    sparse.enable(tiny.model, name, **ALL[name])
    out = tiny()
    assert not out.equal(expected)  # other kernels ran
    close(out, expected)


@pytest.mark.parametrize("name", WHOLE_FRAMES)
def test_frames_that_all_see_each_other(name):
    tiny = make("wan")
    tiny.inputs["hidden_states"] = torch.randn(BATCH, 4, 2, 16, 16)
    expected = tiny()
    sparse.enable(tiny.model, name, **WHOLE_FRAMES[name])
    out = tiny()
    assert not out.equal(expected)
    close(out, expected)


@pytest.mark.parametrize(
    ("tiny", "name"),
    [
        *(pytest.param(video, name, id=f"video-{name}") for name in SOME),
        *(pytest.param(image, n, id=f"image-{n}") for n in SOME if n not in ONLY_VIDEO),
    ],
)
def test_a_model_computes_the_pattern(tiny, name):
    tiny = tiny()
    options = SOME[name] if len(tiny.grid) == 3 else OF_IMAGES.get(name, SOME[name])
    dense = tiny()
    with torch_attention_by(name, tiny, options) as seen:
        expected = tiny()
    assert len(seen) == tiny.layers
    assert (expected - dense).abs().max() > 1e-2 * dense.abs().max()
    sparse.enable(tiny.model, name, **options)
    close(tiny(), expected)


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"sol", "psa"}))
def test_what_keeps_everything_is_reported(name):
    tiny = make("wan", layers=1)
    sparse.enable(tiny.model, name, **ALL[name])
    with pytest.warns(UserWarning, match="has no effect"):
        tiny()


@pytest.mark.parametrize("name", SOME)
def test_copies_compute_the_same(name):
    tiny = video()
    sparse.enable(tiny.model, name, **SOME[name])
    expected = tiny()
    for copied in (copy.deepcopy(tiny.model), pickle.loads(pickle.dumps(tiny.model))):
        tiny.model = copied
        assert tiny().equal(expected)


def test_masks_of_inference_serve_training():
    tiny = make("wan")
    sparse.enable(tiny.model, "cube_top_k", keep=0.4)
    with torch.inference_mode():
        expected = tiny.model(**tiny.inputs, return_dict=False)[0].clone()
    out = tiny.model(**tiny.inputs, return_dict=False)[0]
    out.sum().backward()
    assert out.equal(expected)
    assert tiny.model.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ONLY_VIDEO)
def test_methods_for_videos_in_a_model_of_images(name):
    tiny = make("flux")
    with pytest.raises(ValueError, match="the grid of FluxTransformer2DModel has 2 axes"):
        sparse.enable(tiny.model, name)
    assert not sparse.is_enabled(tiny.model)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("sol", {"tau": "x"}, TypeError, "tau"),
        ("sol", {"rest": "all"}, ValueError, "rest"),
        ("sol", {"block": 100}, ValueError, "block"),
        ("sol", {"keep": 1}, TypeError, r"options of method 'sol' must be among \['tau',"),
        ("subblock", {"keep": 2}, ValueError, "keep must be from 0 to 1"),
        ("subblock", {"piece": 5}, ValueError, "piece must divide block_q = 64, got 5"),
        ("cube_top_k", {"keep": -1}, ValueError, "keep must be from 0 to 1"),
        ("cube_top_k", {"cube": 4}, TypeError, "cube must be a sequence of ints, one for each"),
        (
            "cube_top_k",
            {"cube": (4, 4, 2)},
            ValueError,
            r"cube must have 64 or 128 tokens, as blocks of queries have, got \[4, 4,",
        ),
        ("cube_top_k", {"cube": (8, 8)}, ValueError, "cube must have one entry for each of the 3"),
        ("vsa", {"keep": 1.5}, ValueError, "keep must be from 0 to 1"),
        ("draft", {"keep": "x"}, TypeError, "keep"),
        ("rectified", {"theta": 2}, ValueError, "theta must be from 0 to 1"),
        ("psa", {"shares": {3: 0.5}}, ValueError, "levels of shares must be 1, 2, 4 or 8, got 3"),
        ("psa", {"by": "size"}, ValueError, "by"),
        ("psa", {"every": 5}, ValueError, "every must divide block_q = 128, got 5"),
        ("sliding_tile", {"tile": (1, 1, 1)}, TypeError, "window must be given for method 'sli"),
        ("sliding_tile", {"tile": 4, "window": (1, 1, 1)}, TypeError, "tile must be a sequence"),
        (
            "sliding_tile",
            {"tile": (1, 1), "window": (1, 1, 1)},
            ValueError,
            r"window must have as many entries as tile = \(1, 1\)",
        ),
        ("sliding_tile", {"tile": (0, 1, 1), "window": (1, 1, 1)}, ValueError, r"tile\[0\]"),
        ("radial", {"decay": 0}, ValueError, "decay must be above 0, got 0"),
        ("radial", {"block": 32}, ValueError, "block"),
        ("svg", {"keep": 3}, ValueError, "keep must be from 0 to 1"),
        ("svg", {"rows": 0}, ValueError, "rows must be at least 1"),
        ("nabla", {"window": (2, 1, 1)}, ValueError, r"window\[0\] must be odd, got 2"),
        ("nabla", {"window": 3}, TypeError, "window must be a sequence of ints"),
        ("nabla", {"p": 2}, ValueError, "p must be from 0 to 1"),
    ],
)
def test_options_that_are_not_allowed(name, options, error, message):
    tiny = make("wan", layers=1)
    with pytest.raises(error, match=message):
        sparse.enable(tiny.model, name, **options)
    assert not sparse.is_enabled(tiny.model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sliding_tile",
            {"tile": (4, 4, 3), "window": (1, 1, 1)},
            r"tile\[1\] must divide grid\[1\] = 5, got 4",
        ),
        (
            "sliding_tile",
            {"tile": (1, 1, 1), "window": (5, 1, 1)},
            r"window\[0\] must be at most the 4 tiles of that axis, got 5",
        ),
        ("radial", {}, r"block must be below 3 \* 30, the tokens of a frame of .*, got 128"),
        ("svg", {}, "keep must leave a band of at least a block of 128 tokens beside 0 of"),
    ],
)
def test_options_that_do_not_fit_the_grid(name, options, message):
    tiny = make("wan", layers=1)
    sparse.enable(tiny.model, name, **options)
    with pytest.raises(ValueError, match=message):
        tiny()
