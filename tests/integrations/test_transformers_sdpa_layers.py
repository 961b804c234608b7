"""Layers with the method sdpa: Gemma 4, whose full attention has a head dim without kernels."""

import pytest
import torch

pytest.importorskip("transformers.models.gemma4")

import transformers as hf
from tiny_text import DECODER, ids, model, run

from sparse_fmha.integrations import _transformers_decode as one
from sparse_fmha.integrations import _transformers_plan as masks
from sparse_fmha.integrations import transformers as sparse
from sparse_fmha.integrations._layer_table import parse

pytestmark = pytest.mark.usefixtures("registered")
NAME = "sparse_with_sdpa"


@pytest.fixture(scope="module", autouse=True)
def method():
    sparse.register(NAME, {"full_attention": {"method": "sdpa"}})


SHARED = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}


def gemma4(**options):
    """Layers of both kinds in turn, with own head dims."""
    torch.manual_seed(0)
    options = {"num_hidden_layers": 6, "hidden_size_per_layer_input": 0, **options}
    options["vocab_size_per_layer_input"] = DECODER["vocab_size"]
    kinds = ["sliding_attention", "full_attention"] * (options["num_hidden_layers"] // 2)
    config = hf.Gemma4TextConfig(
        **{**DECODER, "global_head_dim": 264, **options}, head_dim=16, sliding_window=40,
        layer_types=kinds,
    )  # fmt: skip
    return hf.Gemma4ForCausalLM(config).eval()


def padded(padding, tokens):
    seen = torch.ones_like(tokens)
    if padding == "right":
        seen[0, 100:] = 0
    if padding in ("left", "between"):
        seen[1, :60] = 0
    if padding == "between":
        seen[0, 30:40] = 0
    return seen


@pytest.mark.parametrize("options", [{}, SHARED, {"attention_k_eq_v": True}])
@pytest.mark.parametrize("padding", ["none", "right", "left", "between"])
def test_as_sdpa(options, padding):
    net, tokens, calls = gemma4(**options), ids(), []
    seen = padded(padding, tokens)
    inputs = {"input_ids": tokens, "attention_mask": seen, "use_cache": bool(options)}
    found = run(net, NAME, calls, **inputs)
    wanted = run(net, "sdpa", [], **inputs)
    torch.testing.assert_close(found[seen.bool()], wanted[seen.bool()], rtol=1e-4, atol=1e-4)
    windows = "neighborhood_attention" if padding == "none" else "block_sparse_attention"
    assert calls == [windows] * 3


@pytest.mark.parametrize("padding", ["none", "left", "between"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(cache, padding, monkeypatch):
    """Windows decode here, full attention in torch; past the window.

    Of a prompt, layers that share keys compute the last token alone.
    """
    net, tokens = gemma4(**SHARED), ids(70)
    seen = torch.ones_like(tokens)
    if padding != "none":
        seen[1, :30] = 0
    if padding == "between":
        seen[0, 50:55] = 0  # in the window of the prompt's last token
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    options |= {} if cache is None else {"cache_implementation": cache}
    net.set_attn_implementation("sdpa")
    wanted = net.generate(tokens, attention_mask=seen, **options)
    net.set_attn_implementation(NAME)
    calls, function = [], one.decode_attention
    monkeypatch.setattr(
        one, "decode_attention", lambda *a, **k: (calls.append(a[0].shape[3]), function(*a, **k))[1]
    )
    assert net.generate(tokens, attention_mask=seen, **options).equal(wanted)
    # Of the prompt the window that shares keys; then all three. Padding between goes elsewhere.
    assert set(calls) <= {16}
    if padding != "between":
        assert len(calls) == 1 + 3 * 11


@pytest.mark.parametrize("kept", [1, 5, 200])
@pytest.mark.parametrize("padding", ["none", "right", "left", "between"])
@pytest.mark.parametrize(("name", "dim"), [(NAME, 264), ("sparse_fmha", 32)])
def test_the_last_tokens_of_a_prompt(kept, padding, name, dim):
    """In layers that share keys nothing else is computed; also with head dims that fit."""
    net, tokens = gemma4(**SHARED, global_head_dim=dim), ids()
    seen = padded(padding, tokens)
    if padding == "between":
        seen[0, 135:140] = 0
    inputs = {"input_ids": tokens, "attention_mask": seen, "use_cache": True}
    calls = []
    found = run(net, name, calls, **inputs, logits_to_keep=kept)
    wanted = run(net, "eager", [], **inputs, logits_to_keep=kept)
    rows = seen.bool()[:, -kept:]
    torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-4, atol=1e-4)
    assert "sdpa_attention_forward" not in calls


def test_parts_of_a_plan():
    plan = masks.Plan(causal=True, keys=9)
    assert plan[:, :, -3:, :] is plan
    windows = masks.Plan(window=4, keys=9)
    assert windows[:, :, 0:, :] is windows
    assert windows[:, :, -3:, :].last == 3
    for at in (0, (slice(None),) * 3, (slice(None), slice(None), slice(2), slice(None))):
        with pytest.raises(TypeError, match="a plan has the parts"):
            plan[at]


def test_a_prompt_in_two_parts():
    """Queries after a cache: causal, aligned to the last key."""
    net, tokens = gemma4(), ids(90)
    found = []
    for name in ("sdpa", NAME):
        net.set_attn_implementation(name)
        with torch.no_grad():
            cache = net(tokens[:, :50], use_cache=True).past_key_values
            found.append(net(tokens[:, 50:], past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_gradients():
    net, tokens, found = gemma4(num_hidden_layers=2), ids(60), []
    seen = padded("left", tokens)
    seen[1, :20] = 0
    seen[1, 20:] = 1
    for name in ("sdpa", NAME):
        net.set_attn_implementation(name)
        net.zero_grad()
        logits = net(tokens, attention_mask=seen, use_cache=False).logits
        logits[seen.bool()].square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_a_whole_model(name):
    """As with sdpa, of every kind of mask; no other attention is called."""
    sparse.register("sparse_all_sdpa", {"default": {"method": "sdpa"}})
    net, tokens, calls = model(name), ids(), []
    seen = padded("left", tokens)
    for inputs in ({}, {"attention_mask": seen}):
        found = run(net, "sparse_all_sdpa", calls, input_ids=tokens, **inputs)
        wanted = run(net, "sdpa", [], input_ids=tokens, **inputs)
        rows = seen.bool() if inputs else torch.ones_like(seen, dtype=torch.bool)
        torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-4, atol=1e-5)
    assert calls == []


def test_with_a_cap_and_a_sink():
    """Which torch's SDPA does not have: in its other functions, and without dropout."""
    q, k, v = (torch.randn(1, h, 9, 264) for h in (4, 2, 2))
    method_of = parse({"default": {"method": "sdpa"}})
    module = torch.nn.Linear(1, 1)
    options = {"is_causal": True, "method_of": method_of, "softcap": 1.5, "scaling": 0.1}
    out, _ = sparse.attend(module, q, k, v, None, **options, s_aux=torch.tensor([0.0, 1, 2, 3]))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = 1.5 * (q @ k.mT * 0.1 / 1.5).tanh()
    scores.masked_fill_(~torch.ones(9, 9).tril().bool(), -torch.inf)
    sink = torch.arange(4.0)[None, :, None, None].expand(1, 4, 9, 1)
    expected = torch.cat([scores, sink], 3).softmax(3)[..., :9] @ v
    torch.testing.assert_close(out.transpose(1, 2), expected)
    with pytest.raises(NotImplementedError, match="attention dropout of Linear must be 0"):
        sparse.attend(module, q, k, v, None, 0.1, **options)
