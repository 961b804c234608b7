"""Tiny random models of transformers: the same numbers as with torch's SDPA."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

from sparse_fmha.calibration import Calibration, Point
from sparse_fmha.integrations import _layers
from sparse_fmha.integrations import transformers as sparse

SMALL = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
DECODER = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=40)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    sparse.register()


def model(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def ids(length=150, batch=2, seed=0):
    return torch.randint(1, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(net, implementation, calls, **inputs):
    """The first output of a model; `calls` gets the names of our functions that it called."""
    net.set_attn_implementation(implementation)
    with pytest.MonkeyPatch.context() as patch:
        ours = "attention", "neighborhood_attention", "block_sparse_attention"
        for name in (*ours, "sdpa_attention_forward"):
            function = getattr(sparse, name)

            def noted(*args, function=function, name=name, **kwargs):
                calls.append(name)
                return function(*args, **kwargs)

            patch.setattr(sparse, name, noted)
        return net(**inputs)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["none", "all ones", "right", "left"])
def test_as_sdpa(name, padding):
    net, tokens = model(name), ids()
    inputs = {"input_ids": tokens}
    seen = torch.ones_like(tokens)
    if padding == "right":
        seen[0, 100:] = 0
    if padding == "left":
        seen[1, :60] = 0
    if padding != "none":
        inputs["attention_mask"] = seen
    calls = []
    found = run(net, "sparse_fmha", calls, **inputs)
    wanted = run(net, "sdpa", [], **inputs)
    real = seen.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)
    plain = "neighborhood_attention" if name == "mistral" else "attention"
    whole = padding in ("none", "all ones")
    assert calls == [plain if whole else "block_sparse_attention"] * 2


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_token_by_token(name, padded):
    """The prompt by our kernels, then single queries by torch's."""
    net, tokens = model(name), ids(60)
    seen = torch.ones_like(tokens)
    if padded:
        tokens[0, :20], seen[0, :20] = 0, 0
    options = {"attention_mask": seen, "max_new_tokens": 12, "do_sample": False}
    results = []
    for implementation in ("sdpa", "sparse_fmha"):
        net.set_attn_implementation(implementation)
        results.append(net.generate(tokens, **options))
    assert results[0].equal(results[1])


def test_a_prompt_in_two_parts():
    """The second part's queries stand behind a cache."""
    net, tokens = model("llama"), ids(130, batch=1)
    net.set_attn_implementation("sparse_fmha")
    with torch.no_grad():
        whole = net(tokens).logits
        first = net(tokens[:, :70], use_cache=True)
        second = net(tokens[:, 70:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 70:], rtol=1e-4, atol=1e-5)


def test_packed_sequences():
    """Positions that begin again are sequences of their own."""
    net, tokens = model("llama"), ids(90, batch=1)
    positions = torch.cat([torch.arange(50), torch.arange(40)])[None]
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    found = run(net, "sparse_fmha", [], **inputs)
    wanted = run(net, "sdpa", [], **inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_queries_and_keys_arrive_as_views(monkeypatch):
    seen = []

    def watched(q, k, v, **options):
        seen.append((q.shape, k.shape, v.is_contiguous()))
        return attention(q, k, v, **options)

    attention = sparse.attention
    monkeypatch.setattr(sparse, "attention", watched)
    run(model("llama"), "sparse_fmha", [], input_ids=ids())
    assert [(q, k) for q, k, _ in seen] == [((2, 150, 4, 16), (2, 150, 2, 16))] * 2
    assert not any(contiguous for *_, contiguous in seen)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("softcap", 50.0, "asks for logit soft-capping, which sparse_fmha does not have"),
        ("s_aux", torch.zeros(4), "asks for attention sinks"),
        ("position_bias", torch.zeros(1), "asks for position_bias"),
        ("dropout", 0.1, "asks for attention dropout 0.1, .* call model.eval"),
    ],
)
def test_options_that_are_not_there(option, value, message):
    q = torch.zeros(1, 4, 20, 16)
    with pytest.raises(NotImplementedError, match=f"Linear {message}"):
        sparse.attend(torch.nn.Linear(1, 1), q, q, q, None, **{option: value})


def test_a_model_with_soft_capping():
    config = hf.Gemma2Config(**DECODER, head_dim=16, attn_logit_softcapping=20.0)
    net = hf.Gemma2ForCausalLM(config).eval()
    net.set_attn_implementation("sparse_fmha")
    with pytest.raises(NotImplementedError, match="Gemma2Attention asks for logit soft-capping"):
        net(ids())


@pytest.mark.parametrize("name", ["my_flash", "org/kernel"])
def test_names_that_transformers_reads_in_its_own_way(name):
    with pytest.raises(ValueError, match=f"name is '{name}'; transformers takes names"):
        sparse.register(name)


def test_compiled():
    net = model("llama")
    net.set_attn_implementation("sparse_fmha")
    tokens = ids()
    torch.compiler.reset()
    with torch.no_grad():
        wanted = net(tokens, use_cache=False).logits
        compiled = torch.compile(net, backend="aot_eager")
        found = compiled(tokens, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


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
        with pytest.raises(NotImplementedError, match=f"layer 1 has a sparse .* here is {reason}"):
            run(model(name), "sparse_by_layer", [], input_ids=tokens, **inputs)
    net = model("llama")
    net.set_attn_implementation("sparse_by_layer")
    cache = net(tokens[:, :60], use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="here is 40 queries and 100 keys, as behind"):
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


def test_weights_are_not_there():
    with pytest.raises(NotImplementedError, match="output_attentions=True asks LlamaAttention"):
        run(model("llama"), "sparse_fmha", [], input_ids=ids(), output_attentions=True)


def test_a_static_cache_is_an_error_that_says_so():
    net = model("llama")
    net.set_attn_implementation("sparse_fmha")
    with pytest.raises(NotImplementedError, match=r"cache_implementation='static'"):
        net.generate(ids(20), max_new_tokens=3, do_sample=False, cache_implementation="static")


def test_a_key_twice_in_a_file(tmp_path):
    path = tmp_path / "methods.json"
    path.write_text('{"layer 1": {"method": "dense"}, "layer 1": {"method": "dense"}}')
    with pytest.raises(ValueError, match="has the key 'layer 1' twice in one object"):
        sparse.register("sparse_by_layer", path)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({"layer x": {"method": "dense"}}, ValueError, "layers has the key 'layer x'; 'default'"),
        ({"layers 5-2": {"method": "dense"}}, ValueError, "which ends before it begins"),
        ({"default": {"method": "magic"}}, ValueError, r"layers\['default'\] is .*dense, skip"),
        ({"default": "dense"}, ValueError, "a mapping with a method is needed"),
        ({"default": {"method": "skip"}}, ValueError, "skip takes a threshold, or a sparsity"),
        (
            {"default": {"method": "skip", "threshold": 0.1, "sparsity": 0.5}},
            ValueError,
            "skip takes a threshold, or a sparsity",
        ),
        (
            {"default": {"method": "skip", "sparsity": 0.5}},
            ValueError,
            "skip takes sparsity and calibration together",
        ),
        (
            {"default": {"method": "skip", "sparsity": 1.5, "calibration": "x"}},
            ValueError,
            "sparsity is 1.5; 0 to",
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
            "layers names layer 2 twice, the second time by 'layer 2'",
        ),
        ({"default": {"method": "skip", "threshold": 7}}, ValueError, "threshold is 7; 0 to"),
        ({"default": {"method": "block_topk", "blocks": 0}}, ValueError, "blocks is 0; at least 1"),
        (3, TypeError, "layers is a int; a mapping or a path is needed"),
    ],
)
def test_layers_that_do_not_make_sense(layers, error, message):
    with pytest.raises(error, match=message):
        sparse.register("sparse_by_layer", layers)
