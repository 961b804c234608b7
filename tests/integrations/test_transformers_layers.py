"""Methods by layer in models of transformers."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from tiny_text import ids, model, run

from sparse_fmha.calibration import Calibration, Point
from sparse_fmha.integrations import _layers
from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.usefixtures("registered")
LAYERS = {
    "dense": {"default": {"method": "dense"}},
    "nothing skipped": {"default": {"method": "skip", "threshold": 0.0}},
    "all blocks": {"layers 0-1": {"method": "block_topk", "blocks": 2, "block_kv": 64}},
    "all keys": {"layer 0": {"method": "vertical_slash", "vertical": 150, "slash": 150}},
    "theta that keeps all": {"default": {"method": "anchor", "theta": 1e4, "block": 64}},
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("as_file", [False, True])
def test_methods_that_leave_nothing_out(tmp_path, layers, as_file):
    net, tokens = model("llama"), ids(120)
    wanted = run(net, "sdpa", [], input_ids=tokens)
    if as_file:
        path = tmp_path / "methods.json"
        path.write_text(json.dumps(layers))
        layers = path
    sparse.register("sparse_by_layer", layers)
    found = run(net, "sparse_by_layer", [], input_ids=tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_each_layer_has_its_own_method(monkeypatch):
    """Layer 1 alone leaves blocks out, and says where it cannot."""
    seen = []

    def watched(q, k, v, mask, **options):
        seen.append(mask.block_density)
        return block_sparse_attention(q, k, v, mask, **options)

    block_sparse_attention = _layers.block_sparse_attention
    monkeypatch.setattr(_layers, "block_sparse_attention", watched)
    options = {"method": "block_topk", "blocks": 1, "block_q": 64, "block_kv": 16}
    sparse.register("sparse_by_layer", {"layer 1": options})
    net, tokens = model("llama"), ids(300)
    found = run(net, "sparse_by_layer", [], input_ids=tokens)
    wanted = run(net, "sdpa", [], input_ids=tokens)
    assert len(seen) == 1
    assert seen[0] < 0.5
    assert (found - wanted).abs().max() > 1e-4


def test_kinds_of_layers(monkeypatch):
    """Full layers of Gemma 3 leave blocks out; its windows stay dense; a number goes first."""
    import transformers as hf

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(
        vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=40,
        layer_types=kinds, pad_token_id=0,
    )  # fmt: skip
    net, tokens, seen = hf.Gemma3ForCausalLM(config).eval(), ids(300), []
    top_k = _layers.selection.top_k_blocks
    monkeypatch.setattr(
        _layers.selection, "top_k_blocks", lambda *a, **k: (seen.append(None), top_k(*a, **k))[1]
    )
    options = {"method": "block_topk", "blocks": 1, "block_q": 64, "block_kv": 16}
    wanted = run(net, "sdpa", [], input_ids=tokens)
    for layers, calls in (
        ({"full_attention": options}, 2),
        ({"full_attention": options, "layer 1": {"method": "dense"}}, 1),
        ({"full_attention": {"method": "dense"}, "sliding_attention": {"method": "dense"}}, 0),
    ):
        seen.clear()
        sparse.register("sparse_by_layer", layers)
        found = run(net, "sparse_by_layer", [], input_ids=tokens)
        assert len(seen) == calls
        assert ((found - wanted).abs().max() > 1e-4) == (calls > 0)
    sparse.register("sparse_by_layer", {"chunked_attention": options})
    with pytest.raises(ValueError, match="has full_attention, sliding_attention, got 'chunked"):
        run(net, "sparse_by_layer", [], input_ids=tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_a_method_chooses(side):
    options = {"method": "block_topk", "blocks": 1, "block_q": 64, "block_kv": 16}
    sparse.register("sparse_by_layer", {"layer 1": options})
    net, tokens = model("llama"), ids(300)
    real = torch.ones_like(tokens, dtype=torch.bool)
    entry = slice(100, None) if side == "left" else slice(200)
    real[0] = False
    real[0, entry] = True
    positions = (real.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": real.long(), "position_ids": positions}
    found = run(net, "sparse_by_layer", [], input_ids=tokens, **inputs)
    alone = run(net, "sparse_by_layer", [], input_ids=tokens[:1, entry])
    torch.testing.assert_close(found[:1, entry], alone, rtol=1e-4, atol=1e-5)
    whole = run(net, "sparse_by_layer", [], input_ids=tokens[1:])
    torch.testing.assert_close(found[1:], whole, rtol=1e-4, atol=1e-5)


def test_where_a_method_is_an_error():
    sparse.register("sparse_by_layer", {"layer 1": {"method": "anchor"}})
    tokens = ids(100)
    holes = torch.ones_like(tokens)
    holes[0, 40] = 0
    cases = [
        ("llama", {"attention_mask": holes}, "padding between tokens"),
        ("mistral", {}, "a sliding window"),
        ("bert", {}, "attention that is not causal"),
    ]
    for name, inputs, reason in cases:
        with pytest.raises(NotImplementedError, match=f"layer 1 has a sparse .*, got {reason}"):
            run(model(name), "sparse_by_layer", [], input_ids=tokens, **inputs)
    net = model("llama")
    net.set_attn_implementation("sparse_by_layer")
    cache = net(tokens[:, :60], use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="got 40 queries and 100 keys, as after"):
        net(tokens[:, 60:], past_key_values=cache)


def calibration(path):
    """A law of threshold * length = 2 exp(3 sparsity), saved."""
    points = [
        Point("prefill", length, 2 * math.exp(3 * s) / length, s, 1000)
        for length in (1024, 4096)
        for s in (0.2, 0.5, 0.8)
    ]
    Calibration(points).save(path)
    return path


def test_a_sparsity_in_place_of_a_threshold(tmp_path, monkeypatch):
    path = calibration(tmp_path / "calibration.json")
    row = {"method": "skip", "sparsity": 0.4, "calibration": str(path)}
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"layer 1": row}))
    sparse.register("sparse_by_layer", file)
    given = []

    def watched(*args, skip_threshold, **options):
        given.append(skip_threshold)
        return attention(*args, skip_threshold=skip_threshold, **options)

    attention = _layers.attention
    monkeypatch.setattr(_layers, "attention", watched)
    for length in (150, 300):
        run(model("llama"), "sparse_by_layer", [], input_ids=ids(length))
    assert given == pytest.approx([2 * math.exp(1.2) / 150, 2 * math.exp(1.2) / 300], rel=1e-4)


def test_a_key_twice_in_a_file(tmp_path):
    path = tmp_path / "methods.json"
    path.write_text('{"layer 1": {"method": "dense"}, "layer 1": {"method": "dense"}}')
    with pytest.raises(
        ValueError, match="keys of one object in the file of layers must be unique, got 'layer 1'"
    ):
        sparse.register("sparse_by_layer", path)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            {"layer x": {"method": "dense"}},
            ValueError,
            "keys of layers must be 'default', 'layer 3', 'layers 8-31' or a name of layer_types",
        ),
        (
            {"layers 5-2": {"method": "dense"}},
            ValueError,
            "keys of layers must not end before they begin, got 'layers 5-2'",
        ),
        (
            {"default": {"method": "magic"}},
            ValueError,
            r"layers\['default'\] must be a mapping with a method, one of dense,",
        ),
        (
            {"default": "dense"},
            ValueError,
            r"layers\['default'\] must be a mapping with a method, one of dense,",
        ),
        (
            {"default": {"method": "skip"}},
            ValueError,
            "exactly one of threshold and sparsity must be given for skip",
        ),
        (
            {"default": {"method": "skip", "threshold": 0.1, "sparsity": 0.5}},
            ValueError,
            "exactly one of threshold and sparsity must be given for skip",
        ),
        (
            {"default": {"method": "skip", "sparsity": 0.5}},
            ValueError,
            "sparsity and calibration must be given together for skip",
        ),
        (
            {"default": {"method": "skip", "sparsity": 1.5, "calibration": "x"}},
            ValueError,
            "sparsity must be from 0 to.*, got 1.5",
        ),
        (
            {"default": {"method": "skip", "sparsity": 0.5, "calibration": "no-such-file"}},
            OSError,
            "no-such-file",
        ),
        ({"default": {"method": "block_topk"}}, ValueError, "block_topk: missing a required arg"),
        ({"default": {"method": "dense", "x": 1}}, ValueError, "dense: got an unexpected keyword"),
        (
            {"layers 0-3": {"method": "dense"}, "layer 2": {"method": "dense"}},
            ValueError,
            "layers must name layer 2 once, got it again in 'layer 2'",
        ),
        (
            {"default": {"method": "skip", "threshold": 7}},
            ValueError,
            "threshold must be from 0 to.*, got 7",
        ),
        (
            {"default": {"method": "block_topk", "blocks": 0}},
            ValueError,
            "blocks must be at least 1, got 0",
        ),
        (3, TypeError, "layers must be a mapping or a path, got int"),
    ],
)
def test_layers_that_do_not_make_sense(layers, error, message):
    with pytest.raises(error, match=message):
        sparse.register("sparse_by_layer", layers)
