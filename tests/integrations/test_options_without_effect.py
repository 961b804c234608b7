"""Options that match nothing, or do nothing in a model or a call: an error, or a warning once."""

import math
import sys
import types
import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

from sparse_fmha.calibration import Calibration, Point
from sparse_fmha.integrations import transformers as sparse
from sparse_fmha.integrations._layer_table import parse

SMALL = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
NAME = "sparse_by_layer"
DENSE = {"method": "dense"}
TOPK = {"method": "block_topk", "blocks": 1, "block_kv": 16}


def model(kind="Llama"):
    torch.manual_seed(0)
    if kind == "Bert":
        return hf.BertModel(hf.BertConfig(**SMALL)).eval()
    config = getattr(hf, f"{kind}Config")(**SMALL, num_key_value_heads=2, pad_token_id=0)
    return getattr(hf, f"{kind}ForCausalLM")(config).eval()


def ids(length=150):
    return torch.randint(1, 90, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(net, layers, tokens, **inputs):
    sparse.register(NAME, layers)
    net.set_attn_implementation(NAME)
    return net(tokens, **inputs)


def warned(net, layers, *lengths):
    """What is reported of calls with so many tokens."""
    sparse.register(NAME, layers)
    net.set_attn_implementation(NAME)
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        for length in lengths:
            net(ids(length), use_cache=False)
    return [str(w.message) for w in seen if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Bert"])
@pytest.mark.parametrize("key", ["layer 99", "layer 2", "layers 1-2", "layers 2-7"])
@pytest.mark.parametrize("method", [DENSE, TOPK], ids=["dense", "sparse"])
def test_layers_that_the_model_does_not_have(kind, key, method):
    with pytest.raises(
        ValueError, match=f"layers must name layers 0 to 1 of .*Attention, got '{key}'"
    ):
        run(model(kind), {key: method}, ids())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 2}, "layers 0 to 1 of the model of Linear, got 'layers 4-5'"),
        (
            {"num_hidden_layers": 2, "decoder_layers": 3},
            "layers 0 to 2 of the model of Linear, got 'layers 4-5'",
        ),
        (
            {"num_hidden_layers": 8, "layer_types": ["linear_attention"] * 8},
            "layers of .* Linear with attention, got .*, which has linear_attention",
        ),
        (
            {"num_hidden_layers": 8, "layer_types": ["conv", "mamba"] * 4},
            "layers of .* Linear with attention, got .*, which has conv, mamba",
        ),
        ({"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}, None),
        ({"num_hidden_layers": 8, "layer_types": ["full_attention", "conv"] * 4}, None),
        ({"num_hidden_layers": 4, "decoder_layers": 6}, None),
        ({}, None),
    ],
)
def test_how_many_layers_of_attention_a_configuration_says(config, message):
    module = torch.nn.Linear(1, 1)
    module.config = types.SimpleNamespace(vocab_size=9, **config)
    layers = parse({"layers 4-5": DENSE})
    if message is None:
        layers.check(module)
    else:
        with pytest.raises(ValueError, match=f"layers must name {message}"):
            layers.check(module)


def test_a_vision_tower_counts_its_own_layers():
    """It has no vocabulary, and modules without an index take what is not named by one."""
    module = torch.nn.Linear(1, 1)
    module.config = types.SimpleNamespace(num_hidden_layers=2)
    layers = parse({"layer 4": TOPK})
    layers.check(module)
    q = torch.randn(1, 4, 20, 16)
    out, _ = sparse.attend(module, q, q, q, None, method_of=layers)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_no_layers_at_all():
    with pytest.raises(
        ValueError, match="layers must have keys such as 'default', 'layer 3' or 'layers 8-31',"
    ):
        sparse.register(NAME, {})


def test_a_default_that_no_layer_takes():
    layers = {"default": TOPK, "layer 0": DENSE, "layer 1": DENSE}
    (message,) = warned(model(), layers, 150, 170)
    assert "'default' of layers has no effect: each of the layers 0 to 1 of the model" in message
    assert not warned(model(), {"default": TOPK, "layer 0": DENSE}, 150, 170)


POINTS = [
    Point("prefill", length, 2 * math.exp(3 * s) / length, s, 1000)
    for length in (64, 200)
    for s in (0.2, 0.5, 0.8)
]
CASES = {
    "threshold": (
        {"method": "skip", "threshold": 0.0},
        "threshold = 0 has no effect: nothing is skipped",
    ),
    "sparsity": (
        {"method": "skip", "sparsity": 0.0, "calibration": Calibration(POINTS)},
        "sparsity = 0 has no effect: nothing is skipped",
    ),
    "least": (
        {"method": "skip", "sparsity": 0.05, "calibration": Calibration(POINTS)},
        "sparsity = 0.05 is outside the range of the calibration, 0.2 to 0.8",
    ),
    "most": (
        {"method": "skip", "sparsity": 0.9, "calibration": Calibration(POINTS)},
        "sparsity = 0.9 is outside",
    ),
    "length": (
        {"method": "skip", "sparsity": 0.5, "calibration": Calibration(POINTS[:3] * 2)},
        "150 keys are outside the range of the calibration, 64 to 64",
    ),
    "blocks": (
        {"method": "block_topk", "blocks": 2, "block_kv": 128},
        "blocks = 2 has no effect: blocks of 128 keys cover all 150 keys",
    ),
    "step": ({"method": "anchor"}, "have no effect: all 150 keys are near"),
    "vertical": (
        {"method": "vertical_slash", "vertical": 150, "slash": 120},
        "vertical = 150 has no effect: it covers all 150 keys",
    ),
    "slash": (
        {"method": "vertical_slash", "vertical": 40},
        "slash = 6096 has no effect: it covers all 150 keys",
    ),
    "few columns": (
        {"method": "vertical_slash", "vertical": 7, "slash": 120},
        "vertical = 7 has no effect: 30 are always taken",
    ),
    "few diagonals": (
        {"method": "vertical_slash", "vertical": 40, "slash": 9},
        "slash = 9 has no effect: 100 are always taken",
    ),
}


@pytest.mark.parametrize(("method", "message"), CASES.values(), ids=CASES)
def test_options_that_do_nothing(method, message):
    (found,) = warned(model(), {"layers 0-1": method}, 150, 150, 151)
    assert found.startswith(f"layers['layers 0-1'], {method['method']}: ")
    assert message in found


@pytest.mark.parametrize(
    ("method", "length"),
    [
        ({"method": "skip", "threshold": 0.1}, 150),
        ({"method": "skip", "sparsity": 0.5, "calibration": Calibration(POINTS)}, 150),
        (TOPK, 150),
        ({"method": "anchor", "block": 64, "step": 1}, 250),
        ({"method": "vertical_slash", "vertical": 40, "slash": 110}, 150),
    ],
)
def test_options_that_do_something(method, length):
    assert not warned(model(), {"layer 0": method}, length)


def test_padding_does_not_count_as_keys():
    layers = {"layer 0": {"method": "block_topk", "blocks": 2, "block_kv": 64}}
    mask = torch.ones(1, 200, dtype=torch.long)
    mask[:, 100:] = 0
    with pytest.warns(
        UserWarning, match="blocks = 2 has no effect: blocks of 64 keys cover all 100 keys"
    ):
        run(model(), layers, ids(200), attention_mask=mask)


def test_decoding_is_dense_and_says_so():
    net = model()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cache = run(net, {"default": TOPK}, ids(), use_cache=True).past_key_values
        with torch.no_grad():
            for _ in range(3):
                net(ids(1), past_key_values=cache)
    (message,) = [str(w.message) for w in seen if "decoding" in str(w.message)]
    assert message.startswith("layers['default'], block_topk: a pass of one query")


def test_a_mask_tensor_with_a_sparse_method_is_an_error():
    mask = torch.zeros(1, 1, 150, 150).masked_fill(torch.ones(150, 150).triu(1) > 0, -1e9)
    with pytest.raises(
        NotImplementedError,
        match="layer 1 has a sparse method, which supports only causal prefill, with",
    ):
        run(model(), {"layer 1": TOPK}, ids(), attention_mask=mask)
    run(model(), {"layer 1": DENSE}, ids(), attention_mask=mask)


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="torch.compile loses the names of nested functions there"
)
def test_reports_do_not_change_what_is_compiled():
    net, tokens = model(), ids()
    wanted = run(net, {"layer 1": TOPK, "default": {"method": "skip", "threshold": 0}}, tokens)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(net, backend="aot_eager")(tokens, use_cache=False).logits
    torch.testing.assert_close(found, wanted.logits, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
