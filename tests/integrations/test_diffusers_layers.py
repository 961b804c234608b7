"""Methods of the bridge to diffusers by layer, by list of blocks and by head."""

import json
import pickle
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_diffusion import make, torch_attention_with

from sparse_fmha.integrations import _diffusion_presets
from sparse_fmha.integrations import diffusers as sparse

WINDOWS = {"layer 0": (3, 3, 2), "layers 1-2": (2, 4, 3)}
LAYERS = {key: {"method": "neighborhood", "window": w} for key, w in WINDOWS.items()}


class Graphs:
    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def masked(tiny, **windows):
    """With torch's attention under a window in some layers, the lists of `windows`."""
    own = torch.nn.functional.scaled_dot_product_attention
    masks = {layer: tiny.visible(w) for w, layers in windows.values() for layer in layers}
    seen = []

    def attention(query, key, value, attn_mask=None, **options):
        if query.shape[-2] == key.shape[-2] == len(tiny.visible(1)):
            attn_mask = masks.get(len(seen), attn_mask)
            seen.append(None)
        return own(query, key, value, attn_mask=attn_mask, **options)

    with torch_attention_with():
        torch.nn.functional.scaled_dot_product_attention = attention
        return tiny()


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_layers_have_their_own_windows():
    tiny = make("wan", layers=4)
    expected = masked(tiny, a=((3, 3, 2), [0]), b=((2, 4, 3), [1, 2]))
    dense = tiny()
    sparse.enable(tiny.model, layers=LAYERS)
    found = tiny()
    close(found, expected)
    processors = [block.attn1.processor for block in tiny.model.blocks]
    assert len({id(p) for p in processors}) == 3  # of two methods, and the original
    copied = pickle.loads(pickle.dumps(tiny.model))
    own, tiny.model = tiny.model, copied
    assert tiny().equal(found)
    tiny.model = own
    sparse.disable(tiny.model)
    assert tiny().equal(dense)


def test_lists_of_blocks_and_a_default():
    """A number goes before a list, a list before the default."""
    tiny = make("flux", layers=2)
    window = {"method": "neighborhood", "window": (4, 5)}
    expected = masked(tiny, a=((4, 5), [2]), b=((3, 3), [0, 1]))
    sparse.enable(
        tiny.model, "neighborhood", window=3, layers={"single_transformer_blocks": window,
                                                      "layer 3": None},
    )  # fmt: skip
    close(tiny(), expected)
    sparse.disable(tiny.model)
    sparse.enable(
        tiny.model,
        layers={
            "single_transformer_blocks": window,
            "layer 3": None,
            "default": {"method": "neighborhood", "window": 3},
        },
    )
    close(tiny(), expected)


def test_a_graph_for_each_method():
    tiny, graphs = make("wan", layers=5), Graphs()
    sparse.enable(tiny.model, layers=LAYERS)
    expected = tiny()
    torch.compiler.reset()
    tiny.model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    assert tiny().equal(expected)
    assert tiny(400).isfinite().all()
    assert graphs.count == 3
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["cube_top_k", "vsa", "draft", "subblock"])
def test_shares_by_head(method):
    """Each head is that of a call in which all heads have its share."""
    tiny = make("wan", layers=1)
    shares, outs = (0.3, 1.0), {}
    heads = torch.eye(2).repeat_interleave(16, 0)[:, :, None] * torch.eye(32)[:, None]
    project = tiny.model.blocks[0].attn1.to_out[0]
    weight = project.weight.data.clone()
    for keep in (*shares, shares):
        sparse.enable(tiny.model, method, keep=keep)
        for head in range(2):  # all of the output that is this head's
            project.weight.data = weight @ heads[:, head]
            outs[keep, head] = tiny()
        sparse.disable(tiny.model)
    project.weight.data = weight
    for head, own in enumerate(shares):
        assert outs[shares, head].equal(outs[own, head])
        if method != "subblock":  # two blocks of 64 tokens: a share of 0.3 is one of them
            assert not outs[shares, head].equal(outs[shares[1 - head], head])


def test_a_preset_of_a_file(tmp_path):
    tiny = make("wan", layers=4)
    path = tmp_path / "mine.json"
    layers = {key: {**value, "window": list(value["window"])} for key, value in LAYERS.items()}
    given = {
        "models": ["WanTransformer3DModel"], "layers": layers, "source": "me",
        "figure": "no figure published", "dense_layers": [3], "first_dense_steps": 1,
    }  # fmt: skip
    path.write_text(json.dumps(given))
    dense = tiny()
    sparse.enable(tiny.model, layers=LAYERS)
    expected = tiny(400)
    sparse.disable(tiny.model)
    for preset in (path, str(path), _diffusion_presets.read(path)):
        sparse.enable(tiny.model, preset=preset)
        assert tiny().equal(dense)
        assert tiny(400).equal(expected)
        sparse.disable(tiny.model)
    preset = _diffusion_presets.read(path)
    assert preset.name == "mine"
    assert preset.fits((4, 5, 6))
    assert not preset.fits((4, 5, 2))
    path.write_text(json.dumps({"models": []}))
    with pytest.raises(ValueError, match="preset must be a JSON file with"):
        sparse.enable(tiny.model, preset=path)


def test_verbose_says_what_each_layer_runs():
    tiny = make("wan", layers=4)
    sparse.enable(tiny.model, layers=LAYERS, verbose=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny()
    told = [str(warning.message) for warning in caught]
    for part in ("blocks [0] of 4 run Neighborhood", "blocks [1, 2] of 4", "blocks [3] stay dense"):
        assert any(part in message for message in told)


def test_dense_layers_go_first():
    tiny = make("wan", layers=4)
    expected = masked(tiny, b=((2, 4, 3), [1, 2]))
    sparse.enable(tiny.model, layers=LAYERS, dense_layers=[0])
    close(tiny(), expected)


def test_no_layer_is_left():
    tiny = make("wan")
    with pytest.warns(UserWarning, match="layers and dense_layers leave no block of Wan"):
        sparse.enable(tiny.model, layers={"layers 0-1": None})


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (ValueError, "layers must have keys such as", {"layers": {}}),
        (TypeError, "layers must be a mapping, got list", {"layers": []}),
        (ValueError, "one of .'blocks'. of Wan.*, got 'lyer 1'", {"layers": {"lyer 1": None}}),
        (ValueError, "must name layers 0 to 1 of Wan.*'layer 2'", {"layers": {"layer 2": None}}),
        (ValueError, "layer 1 once, .* in 'layer 1'", {"layers": {"layers 0-1": None,
                                                                  "layer 1": None}}),
        (ValueError, "must not end before they begin, got 'layers 1-0'",
         {"layers": {"layers 1-0": None}}),
        (ValueError, r"layers\['layer 0'\] must be None or a mapping with a method",
         {"layers": {"layer 0": {"window": 2}}}),
        (TypeError, r"layers\['layer 0'\]: options of method 'sol' must be among",
         {"layers": {"layer 0": {"method": "sol", "window": 2}}}),
        (ValueError, "must not have the key 'default' beside a method",
         {"method": "dense", "layers": {"default": None}}),
        (TypeError, "options must be given in layers", {"layers": LAYERS, "window": 2}),
        (ValueError, "layers must not be given beside preset = 'radial-wan'",
         {"layers": LAYERS, "preset": "radial-wan"}),
        (ValueError, "window must have one entry for each of the 3 axes",
         {"layers": {"layer 1": {"method": "neighborhood", "window": (2, 2)}}}),
    ],
)  # fmt: skip
def test_arguments(error, match, given):
    tiny = make("wan")
    with pytest.raises(error, match=match):
        sparse.enable(tiny.model, **given)
    assert not sparse.is_enabled(tiny.model)


def test_another_number_of_heads():
    tiny = make("wan")
    sparse.enable(tiny.model, "cube_top_k", keep=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="k must have one entry for each head"):
        tiny()
