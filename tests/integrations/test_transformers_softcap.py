"""Gemma 2, whose scores are capped: the same numbers as with its eager attention."""

import inspect

import bias_oracle
import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_text import DECODER, assert_generates_as_eager, ids, noted, run

from sparse_fmha.integrations import _transformers_decode as one
from sparse_fmha.integrations import _transformers_packed as packed
from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def net():
    """A layer with a sliding window and one without, with weights large enough for the cap."""
    torch.manual_seed(0)
    config = hf.Gemma2Config(**DECODER, head_dim=16, sliding_window=40, attn_logit_softcapping=1.5)
    net = hf.Gemma2ForCausalLM(config).eval()
    for layer in net.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 20
    return net


def padded(padding, tokens):
    seen = torch.ones_like(tokens)
    if padding == "right":
        seen[0, 100:] = 0
    if padding == "left":
        seen[1, :60] = 0
    return seen


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_as_eager(net, padding):
    tokens = ids()
    seen = padded(padding, tokens)
    inputs = {"input_ids": tokens, "attention_mask": seen, "use_cache": False}
    calls, real = [], seen.bool()
    found = run(net, "sparse_fmha", calls, **inputs)
    wanted = run(net, "eager", [], **inputs)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    whole = ["neighborhood_attention", "attention"]
    assert calls == (whole if padding == "none" else ["block_sparse_attention"] * 2)


def test_the_cap_matters(net, monkeypatch):
    found = run(net, "eager", [], input_ids=ids())
    for layer in net.model.layers:
        monkeypatch.setattr(layer.self_attn, "attn_logit_softcapping", None)
    without = run(net, "eager", [], input_ids=ids())
    assert (found - without).abs().max() > 1e-2


@pytest.mark.parametrize("padding", ["none", "left"])
def test_gradients_of_adapters(net, padding):
    """Of low-rank terms beside the projections, as LoRA trains them."""
    tokens = ids()
    seen = padded(padding, tokens)
    before = torch.nn.functional.pad(seen, (1, -1))  # a token that the one before it predicts
    labels = tokens.masked_fill(seen * before == 0, -100)
    generator = torch.Generator().manual_seed(1)
    parts, found = [], []
    for layer in net.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            shapes = (4, projection.in_features), (projection.out_features, 4)
            down, up = (torch.randn(s, generator=generator) * 0.1 for s in shapes)
            parts.append((projection, down.requires_grad_(), up.requires_grad_()))
    hooks = [
        p.register_forward_hook(lambda _, x, out, down=a, up=b: out + x[0] @ down.T @ up.T)
        for p, a, b in parts
    ]
    own = [x for _, *both in parts for x in both]
    try:
        for implementation in ("eager", "sparse_fmha"):
            net.set_attn_implementation(implementation)
            loss = net(tokens, attention_mask=seen, labels=labels, use_cache=False).loss
            found.append(torch.autograd.grad(loss, own))
    finally:
        for hook in hooks:
            hook.remove()
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 1e-5
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("first", [0, 20])
def test_generation_token_by_token(net, first):
    """Past the sliding window, with and without padding at the left."""
    tokens = ids(60)
    seen = torch.ones_like(tokens)
    tokens[0, :first], seen[0, :first] = 0, 0
    assert_generates_as_eager(net, tokens, seen, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_steps_of_one_token_are_decode_attention(net, cache, padding, monkeypatch):
    tokens = ids(50)
    seen = torch.ones_like(tokens)
    if padding == "left":
        seen[1, :12] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1}
    options |= {} if cache is None else {"cache_implementation": cache}
    net.set_attn_implementation("eager")
    wanted = net.generate(tokens, attention_mask=seen, **options)
    net.set_attn_implementation("sparse_fmha")
    calls = noted(monkeypatch, one, "decode_attention")
    stored = noted(monkeypatch, sparse, "with_sink")
    assert net.generate(tokens, attention_mask=seen, **options).equal(wanted)
    assert [call["softcap"] for call in calls] == [1.5] * 2 * 19  # two layers, after the prompt
    assert stored == []


def test_continuous_batching(net, monkeypatch):
    """Of ragged requests; the same tokens as each alone with eager attention."""
    module = pytest.importorskip("transformers.generation.continuous_batching")
    if "kwargs" not in inspect.signature(module.PagedAttentionCache.update).parameters:
        pytest.skip("this version calls the attention before the cache")
    prompts = [ids(n, 1, seed=n)[0].tolist() for n in (5, 90, 17, 1)]
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    net.set_attn_implementation("eager")
    wanted = [net.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    decodes = noted(monkeypatch, packed, "decode_attention")
    prefills = noted(monkeypatch, packed._packed, "attend")
    with sparse.continuous_batching(net):
        found = net.generate_batch(
            prompts,
            generation_config=hf.GenerationConfig(**options),
            continuous_batching_config=hf.ContinuousBatchingConfig(
                num_blocks=64, page_size=16, max_batch_tokens=128
            ),
        )
    assert [found[key].generated_tokens for key in sorted(found)] == wanted
    assert {call["softcap"] for call in decodes} == {1.5}
    assert {call["softcap"] for call in prefills} == {1.5}


def test_a_packed_batch_over_pages():
    """One token of each request, as models without a window are called, against the definition."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 1, 4], dtype=torch.int32)
    table = torch.tensor([[3, 1], [0, -1], [4, -1]], dtype=torch.int32)
    k_cache, v_cache = torch.randn(2, 5, 4, 2, 16)
    q, k, v = (torch.randn(1, h, 3, 16) for h in (4, 2, 2))
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    lists = {"cu_seq_lens_q": starts.clamp(max=3), "cu_seq_lens_k": starts, "max_length_q": 1}
    pages = {"block_table": table, "k_cache": k_cache, "v_cache": v_cache}
    out, _ = packed.attend_packed(torch.nn.Linear(1, 1), q, k, v, **lists, **pages, softcap=0.5)
    for b, length in enumerate(lengths.tolist()):
        rows = [(int(table[b, i // 4]), i % 4) for i in range(length)]
        own = (torch.stack([x[row] for row in rows])[None] for x in (k_cache, v_cache))
        mask = torch.ones(1, length, dtype=torch.bool)
        wanted, _ = bias_oracle.attend(q[:, :, b : b + 1].transpose(1, 2), *own, mask, softcap=0.5)
        torch.testing.assert_close(out[:, b : b + 1].double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_mask_tensor_of_ones_own():
    """In torch's own functions, where dropout would be lost."""
    q, k, v = (torch.randn(1, h, 9, 16) for h in (4, 2, 2))
    mask = torch.randn(1, 1, 9, 9) > 0
    mask[..., 0] = True
    module = torch.nn.Linear(1, 1)
    out, _ = sparse.attend(module, q, k, v, mask, softcap=1.5)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = 1.5 * (q @ k.mT / 6).tanh()
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(out.transpose(1, 2), expected)
    with pytest.raises(NotImplementedError, match="attention dropout of Linear must be 0"):
        sparse.attend(module, q, k, v, mask, 0.1, softcap=1.5)


def test_a_layer_with_a_sparse_method(net):
    sparse.register("sparse_by_layer", {"layer 1": {"method": "anchor"}})
    with pytest.raises(NotImplementedError, match=r"layer 1 has a sparse .*got logit soft-capping"):
        run(net, "sparse_by_layer", [], input_ids=ids(100))
