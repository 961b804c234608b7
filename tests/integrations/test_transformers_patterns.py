"""Published methods by name in models of transformers, against the patterns called directly."""

import json
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from tiny_text import ids, model, run

from sparse_fmha import (
    StripeMask,
    attention,
    block_sparse_attention,
    patterns,
    stripe_attention,
)
from sparse_fmha.integrations import transformers as sparse
from sparse_fmha.integrations._layer_table import METHODS

pytestmark = pytest.mark.usefixtures("registered")
NAME = "sparse_by_layer"
TOKENS = 300
HEADS = [
    {"0": ["vertical_and_slash", 30, 100, 1], "1": ["stream_llm", 10, 40, 1]},
    {"0": ["block_sparse", 0, 0, 1], "3": ["vertical_and_slash", 30, 120, 1]},
]
ALL = {  # keeps all of 150 tokens
    "minference": {"file": [{"0": ["stream_llm", 10, 150, 1]}, {}]},
    "flexprefill": {"gamma": 1.0, "block": 64},
    "streaming_llm": {"window": 150},
    "moa": {"alphas": [150] * 4, "betas": [0] * 4},
    "s2": {"stride": 1},
    "power": {"block": 128},
    "dhsa": {"density": 1.0},
    "hip": {"keys": 150},
    "token_top_k": {"keys": 150},
    "ssa": {"blocks": 10},
    "psa": {"shares": [1, 1, 1, 1]},
    "mminference": {"strides": [1, 151]},
    "token_sparse": {"tau": 0.0},
}
SOME = {
    "minference": {"file": HEADS, "top_k": 2},
    "flexprefill": {"gamma": 0.3, "tau": 0.0, "block": 64},
    "streaming_llm": {"window": 50, "sink": 3},
    "moa": {"alphas": [0, 0, 64, 0], "betas": [0.5, 0.7, 0.1, 0.9], "sink": 64, "min_span": 65},
    "s2": {"local_blocks": 1, "stride": 3, "homo_head": False},
    "power": {"sink_blocks": 0, "local_blocks": 1, "block": 64},
    "dhsa": {"density": 0.3, "shared": True},
    "hip": {"keys": 16, "granule": 4, "local": 64, "first": 2},
    "token_top_k": {"keys": 20, "local": 64, "first": 2},
    "ssa": {"blocks": 3, "block": 16},
    "psa": {"shares": [0.2, 0.4, 0.6, 0.8], "block": 64},
    "mminference": {"strides": [5, 12, 7000], "last": 40},
    "token_sparse": {"tau": 0.4, "min_tokens": 10, "window": 30},
}


def direct(name, q, k, v, options, layer):
    """The pattern called with the same options."""
    n, heads = q.shape[1:3]
    if name == "minference":
        own = patterns.load_minference(HEADS)[layer]
        return patterns.minference_attention(q, k, v, own, top_k=options["top_k"])
    if name == "token_sparse":
        return patterns.token_sparse_attention(
            q, k, v, indices=patterns.token_sparse_indices(q, k, **options)
        )
    if name == "psa":
        sizes = {"causal": True, "block_q": 64, "block_kv": 64}
        levels = patterns.psa_levels(q, k, {1: 0.2, 2: 0.4, 4: 0.6, 8: 0.8}, **sizes)
        return patterns.psa_attention(q, k, v, levels, **sizes)
    if name == "mminference":
        return patterns.mminference_grid_attention(q, k, v, [5, 12], last=40)
    masks = {
        "flexprefill": lambda: patterns.flexprefill_mask(q, k, **options),
        "streaming_llm": lambda: patterns.streaming_llm(n, n, **options),
        "moa": lambda: patterns.moa(n, n, **options),
        "s2": lambda: patterns.s2_attention(n, n, heads, **options),
        "power": lambda: patterns.power_attention(n, n, **options, block_q=64, block_kv=64),
        "dhsa": lambda: patterns.dhsa_blocks(q, k, **options),
        "hip": lambda: patterns.hip(q, k, **options),
        "token_top_k": lambda: patterns.token_top_k(q, k, **options),
        "ssa": lambda: patterns.ssa(q, k, **options),
    }
    mask = masks[name]()
    by_keys = isinstance(mask, StripeMask)
    return (stripe_attention if by_keys else block_sparse_attention)(q, k, v, mask)


def row(tmp_path, name, options):
    """A method of `layers`; a file where it takes one."""
    if "file" in options:
        path = tmp_path / "heads.json"
        path.write_text(json.dumps(options["file"]))
        options = {**options, "file": str(path)}
    return {"method": name, **options}


def test_each_method_is_tested():
    ours = {"dense", "sdpa", "skip", "block_topk", "anchor", "vertical_slash"}
    assert ALL.keys() == SOME.keys() == METHODS.keys() - ours


@pytest.mark.parametrize("name", ALL)
def test_what_leaves_nothing_out_is_dense(tmp_path, name):
    net, tokens = model("llama"), ids(150)
    wanted = run(net, "sdpa", [], input_ids=tokens)
    sparse.register(NAME, {"default": row(tmp_path, name, ALL[name])})
    found = run(net, NAME, [], input_ids=tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_a_model_computes_the_pattern(tmp_path, monkeypatch, name):
    """Layer by layer, where it differs from dense attention."""
    sparse.register(NAME, {"default": row(tmp_path, name, SOME[name])})
    compared = []
    own = sparse._sparse

    def watched(method, layer, q, k, v, plan, scale):
        out = own(method, layer, q, k, v, plan, scale)
        torch.testing.assert_close(out, direct(name, q, k, v, SOME[name], layer))
        assert (out - attention(q, k, v, causal=True)).abs().max() > 1e-3
        compared.append(layer)
        return out

    monkeypatch.setattr(sparse, "_sparse", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model("llama"), NAME, [], input_ids=ids(TOKENS))
    assert compared == [0, 1]


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"flexprefill"}))
def test_what_leaves_nothing_out_is_reported(tmp_path, name):
    sparse.register(NAME, {"default": row(tmp_path, name, ALL[name])})
    with pytest.warns(UserWarning, match=rf"'default'\], {name}: .* no effect"):
        run(model("llama"), NAME, [], input_ids=ids(150))


def test_masks_of_inference_serve_training():
    sparse.register(NAME, {"default": {"method": "streaming_llm", "window": 50}})
    net, tokens = model("llama"), ids(150)
    net.set_attn_implementation(NAME)
    with torch.inference_mode():
        wanted = net(tokens).logits
    found = net(tokens).logits
    found.sum().backward()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert net.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "minference", "file": "no-such-file"}, OSError, "no-such-file"),
        ({"method": "minference"}, ValueError, "minference: missing a required argument: 'file'"),
        ({"method": "flexprefill", "gamma": 7}, ValueError, "gamma must be from 0 to 1"),
        ({"method": "flexprefill", "min_budget": 0}, ValueError, "min_budget must be at least 1"),
        ({"method": "flexprefill", "block": 100}, ValueError, "block"),
        ({"method": "streaming_llm", "window": 0}, ValueError, "window must be at least 1"),
        ({"method": "streaming_llm", "sink": 0.5}, TypeError, "sink"),
        ({"method": "moa", "alphas": [1, 2], "betas": [1]}, ValueError, "alphas and betas must"),
        ({"method": "moa", "alphas": ["x"], "betas": [1]}, TypeError, "alphas must be numbers"),
        ({"method": "s2", "stride": 0}, ValueError, "stride must be at least 1"),
        ({"method": "s2", "homo_head": 3}, TypeError, "homo_head"),
        ({"method": "power", "local_blocks": 0}, ValueError, "local_blocks must be at least 1"),
        ({"method": "power", "block": 100}, ValueError, "block"),
        ({"method": "dhsa", "density": 2}, ValueError, "density must be from 0 to 1"),
        ({"method": "dhsa", "boundaries": []}, ValueError, "unexpected keyword.*'boundaries'"),
        ({"method": "hip", "keys": 5}, ValueError, "keys must be a multiple of granule = 2, got 5"),
        ({"method": "token_top_k"}, ValueError, "missing a required argument: 'keys'"),
        ({"method": "token_top_k", "keys": -1}, ValueError, "keys must be at least 0"),
        ({"method": "token_top_k", "keys": 9, "local": 5.5}, TypeError, "local"),
        ({"method": "ssa", "blocks": 0}, ValueError, "blocks must be at least 1"),
        ({"method": "ssa", "block": 7}, ValueError, "block"),
        ({"method": "psa", "shares": [1]}, ValueError, "shares must have one entry for each of"),
        ({"method": "psa", "shares": 0.5}, TypeError, "shares must be"),
        ({"method": "psa", "shares": [0.5, 0.2, 0.6, 0.7]}, ValueError, r"shares\[2\] must be at"),
        ({"method": "psa", "block": 100}, ValueError, "block"),
        ({"method": "mminference", "strides": []}, ValueError, "strides must have at least one"),
        ({"method": "mminference", "strides": [0]}, ValueError, r"strides\[0\] must be at least 1"),
        ({"method": "mminference", "strides": [4], "last": 0}, ValueError, "must be at least 1"),
        ({"method": "token_sparse", "tau": -1}, ValueError, "tau must be from 0 to 1"),
        ({"method": "token_sparse", "window": 0}, ValueError, "window must be at least 1"),
    ],
)
def test_options_that_are_not_allowed(options, error, message):
    with pytest.raises(error, match=message):
        sparse.register(NAME, {"default": options})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "minference",
            {"file": HEADS[:1]},
            "file must have the patterns of layer 1, got those of 1 layers",
        ),
        (
            "minference",
            {"file": [{"7": ["stream_llm", 1, 2, 1]}] * 2},
            "patterns must have heads 0 to 3, got 7",
        ),
        (
            "moa",
            {"alphas": [1], "betas": [1]},
            "alphas must have one entry for each of the 4 query heads, got 1",
        ),
    ],
)
def test_options_that_do_not_fit_the_model(tmp_path, name, options, message):
    sparse.register(NAME, {"default": row(tmp_path, name, options)})
    with pytest.raises(ValueError, match=message):
        run(model("llama"), NAME, [], input_ids=ids(100))
