"""Generation on decode attention: the same tokens as torch's attention, with each kind of cache."""

import inspect

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_text import ids, model, noted
from transformers import masking_utils

from sparse_fmha.integrations import _transformers_decode as one
from sparse_fmha.integrations import _transformers_masks as masks
from sparse_fmha.integrations import _transformers_packed as packed
from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.usefixtures("registered")


def generated(net, implementation, tokens, seen, steps, **options):
    net.set_attn_implementation(implementation)
    options |= {"max_new_tokens": steps, "do_sample": False, "eos_token_id": -1}
    return net.generate(tokens, attention_mask=seen, **options)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["none", "left", "between"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma"])
def test_tokens_are_those_of_sdpa(name, padding, cache, monkeypatch):
    """Also past the sliding window."""
    net, tokens = model(name), ids(30)
    seen = torch.ones_like(tokens)
    if padding != "none":
        seen[1, :12] = 0
    if padding == "between":
        seen[0, 9:14] = 0
    options = {} if cache is None else {"cache_implementation": cache}
    wanted = generated(net, "sdpa", tokens, seen, 20, **options)
    calls = noted(monkeypatch, sparse, "decode")
    others = noted(monkeypatch, sparse, "sdpa_attention_forward")
    assert generated(net, "sparse_fmha", tokens, seen, 20, **options).equal(wanted)
    steps = 2 * 19  # of two layers, after the prompt
    assert (len(calls), len(others)) == (steps, 0)


def batching():
    return hf.ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=128)


@pytest.mark.parametrize(("name", "steps"), [("llama", 125), ("mistral", 60)])
def test_continuous_batching(name, steps, monkeypatch):
    """Of ragged requests, more than are in work at a time; a thousand tokens without a window."""
    cache = pytest.importorskip("transformers.generation.continuous_batching").PagedAttentionCache
    if "kwargs" not in inspect.signature(cache.update).parameters:
        pytest.skip("this version calls the attention before the cache")
    net = model(name)
    prompts = [ids(n, 1, seed=n)[0].tolist() for n in (5, 140, 17, 90, 3, 61, 1, 33)]
    config = hf.GenerationConfig(
        max_new_tokens=steps, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    options = {"generation_config": config, "continuous_batching_config": batching()}

    def run():
        outputs = net.generate_batch(prompts, **options)
        return [outputs[key].generated_tokens for key in sorted(outputs)]

    net.set_attn_implementation("sdpa")
    wanted = run()
    assert [len(tokens) for tokens in wanted] == [steps] * 8
    decodes = noted(monkeypatch, packed, "decode_attention")
    prefills = noted(monkeypatch, packed._packed, "attend")
    with sparse.continuous_batching(net):
        assert net.config._attn_implementation == packed.NAME
        assert run() == wanted
    assert net.config._attn_implementation == "sdpa"
    assert len(decodes) > steps
    assert prefills
    in_place = [call["page_table"] is not None for call in decodes if "page_table" in call]
    assert all(in_place)
    # Sliding windows have no block tables.
    assert bool(in_place) == (name == "llama")


def test_new_tokens_are_written_into_pages():
    """Padded requests write nothing, wherever their table points."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 1, 4, 0, 0], dtype=torch.int32)
    table = torch.tensor([[3, 1], [0, -1], [4, -1], [-1, -1], [2, 2]], dtype=torch.int32)
    caches = torch.randn(2, 5, 4, 2, 16)
    q, k, v = (torch.randn(1, h, 5, 16) for h in (4, 2, 2))
    expected = caches.clone()
    for b, (page, row) in enumerate([(1, 0), (0, 0), (4, 3)]):
        for to, x in zip(expected, (k, v), strict=True):
            to[page, row] = x[0, :, b]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    lists = {"cu_seq_lens_q": starts.clamp(max=3), "cu_seq_lens_k": starts, "max_length_q": 1}
    pages = {"block_table": table, "k_cache": caches[0], "v_cache": caches[1]}
    out, _ = packed.attend_packed(torch.nn.Linear(1, 1), q, k, v, **lists, **pages)
    assert caches.equal(expected)
    wanted = packed.decode_attention(
        q[0].transpose(0, 1)[:, None], *expected, lengths, page_table=table
    )
    assert out.equal(wanted.transpose(0, 1))
    assert out[0, 3:].eq(0).all()


def test_a_packed_batch_with_sinks_and_a_window():
    """As gpt-oss calls it, against its own attention request by request."""
    torch.manual_seed(0)
    starts_q, starts_k = [0, 3, 4, 9], [0, 10, 31, 36]
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, 9), (2, 36), (2, 36)))
    sinks = torch.randn(4)
    lists = {
        "cu_seq_lens_q": torch.tensor(starts_q, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor(starts_k, dtype=torch.int32),
        "max_length_q": 5,
        "max_length_k": 21,
    }
    for window in (None, 4):
        module = torch.nn.Linear(1, 1)
        options = {"sliding_window": window, "s_aux": sinks, "scaling": 0.3}
        out, _ = packed.attend_packed(module, q, k, v, **lists, **options)
        for i in range(3):
            queries, keys = (slice(*x[i : i + 2]) for x in (starts_q, starts_k))
            own = [x[:, :, s] for x, s in ((q, queries), (k, keys), (v, keys))]
            at = torch.arange(own[0].shape[2])[:, None] + own[1].shape[2] - own[0].shape[2]
            keys_at = torch.arange(own[1].shape[2])
            mask = (keys_at <= at) & (keys_at > at - (window or 99))
            wanted = sparse.with_sink(*own, mask, sinks, 0.3)
            torch.testing.assert_close(out[:, queries], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparse_fmha_flash is for generate_batch only, inside of continuous_batching"),
        ({"position_bias": torch.zeros(1)}, "does not support position_bias, which Linear"),
        ({"attention_mask": torch.zeros(1)}, "supports no attention_mask or dropout"),
        ({"dropout": 0.5}, "supports no attention_mask or dropout"),
    ],
)
def test_what_a_packed_batch_refuses(options, message):
    q = torch.zeros(1, 4, 6, 16)
    starts = torch.tensor([0, 6], dtype=torch.int32)
    if options:
        options = {**options, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    with pytest.raises(NotImplementedError, match=message):
        packed.attend_packed(torch.nn.Linear(1, 1), q, q, q, **options)


def test_a_version_that_calls_the_attention_first():
    q = torch.zeros(1, 4, 6, 16)
    with pytest.raises(NotImplementedError, match="sparse_fmha_flash needs a transformers whose"):
        packed.attend_packed(torch.nn.Linear(1, 1), q, q, q, cu_seq_lens_k={"full_attention": q})


def both_ends(length):
    seen = torch.ones(3, length, dtype=torch.bool)
    seen[1, :5], seen[2, length - 7 :] = False, False
    return seen


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("room", [0, 20])
@pytest.mark.parametrize("padding", ["none", "ends", "between"])
def test_what_one_sees_is_the_mask_of_sdpa(padding, room, window):
    """Of a cache of 60 tokens, with room behind as a static one has."""
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    real = None if padding == "none" else both_ends(60)
    if padding == "between":
        real[0, 30], real[0, 55:57], real[1, 54] = False, False, False
    arguments = (3, 1, 60 + room, torch.tensor(59) if room else 59, 0, function)
    seen = masks.plan(*arguments, attention_mask=real)
    assert one.is_of_one(seen)
    assert seen.shape[3] == one.NUMBERS + (60 if padding == "between" else 0)
    wanted = masking_utils.sdpa_mask(
        batch_size=3, q_length=1, kv_length=60 + room, q_offset=59, mask_function=function,
        attention_mask=real, allow_is_causal_skip=False,
    )  # fmt: skip
    assert one.as_mask(seen, 60 + room).equal(wanted)


@pytest.mark.parametrize("padding", ["ends", "between"])
def test_decode_reads_what_is_seen_alone(padding):
    """Keys that are not seen are NaN; of an entry without any, out is 0."""
    real = both_ends(60)
    real[2] = False
    if padding == "between":
        real[0, 30], real[1, 40:50] = False, False
    seen = masks.plan(3, 1, 60, 59, 0, masking_utils.causal_mask_function, attention_mask=real)
    q, (k, v) = torch.randn(3, 4, 1, 16), torch.randn(2, 3, 2, 60, 16)
    mask = one.as_mask(seen, 60)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    ).nan_to_num(0)
    k, v = (x.masked_fill(~mask.mT, torch.nan) for x in (k, v))
    out = one.decode(q, k, v, seen, None, None)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_one_query_with_gradients():
    """They are torch's."""
    net, tokens = model("llama"), ids(1)
    found = []
    for implementation in ("sdpa", "sparse_fmha"):
        net.set_attn_implementation(implementation)
        net.zero_grad()
        net(tokens).logits.square().sum().backward()
        found.append(net.model.layers[0].self_attn.v_proj.weight.grad.clone())
    torch.testing.assert_close(*found)
