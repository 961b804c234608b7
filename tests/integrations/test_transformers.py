"""Tiny random models of transformers: the same numbers as with torch's SDPA."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_text import DECODER, MODELS, ids, model, run

from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.usefixtures("registered")


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
    """The prompt, then single queries."""
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
        ("position_bias", torch.zeros(1), "sparse_fmha does not support position_bias"),
        ("dropout", 0.1, "attention dropout of Linear must be 0 .*got 0.1; .* call model.eval"),
    ],
)
def test_options_that_are_not_there(option, value, message):
    q = torch.zeros(1, 4, 20, 16)
    with pytest.raises(NotImplementedError, match=message):
        sparse.attend(torch.nn.Linear(1, 1), q, q, q, None, **{option: value})


def test_head_dims_above_what_there_are_kernels_for():
    """Gemma 4's full attention; the layer is named."""
    pytest.importorskip("transformers.models.gemma4")
    small = {**DECODER, "num_hidden_layers": 6}
    config = hf.Gemma4TextConfig(
        **small, head_dim=16, global_head_dim=264, hidden_size_per_layer_input=0
    )
    net = hf.Gemma4ForCausalLM(config).eval()
    net.set_attn_implementation("sparse_fmha")
    with pytest.raises(
        NotImplementedError,
        match=r"head dims above 256, Gemma4TextAttention of layer 5 has 264; load .*'sdpa'",
    ):
        net(ids())


@pytest.mark.parametrize("name", ["my_flash", "org/kernel"])
def test_names_that_transformers_reads_in_its_own_way(name):
    with pytest.raises(ValueError, match=f"name must not have .*, got '{name}'"):
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


def test_weights_are_not_there():
    with pytest.raises(
        NotImplementedError,
        match="output_attentions must be False for LlamaAttention, because sparse_fmha",
    ):
        run(model("llama"), "sparse_fmha", [], input_ids=ids(), output_attentions=True)
