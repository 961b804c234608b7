"""gpt-oss and MiMo, whose heads have sinks: the same numbers as with their eager attention."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_text import assert_generates_as_eager, ids, run

from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.usefixtures("registered")


def gpt_oss():
    config = hf.GptOssConfig(
        vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2,
        num_experts_per_tok=1, sliding_window=40, max_position_embeddings=512, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return hf.GptOssForCausalLM(config)


def mimo():
    """Its layers without a window have no sinks, and values fewer numbers than keys."""
    if not hasattr(hf, "MiMoV2FlashConfig"):
        pytest.skip("this version of transformers does not have MiMo")
    config = hf.MiMoV2FlashConfig(
        vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, v_head_dim=16,
        moe_intermediate_size=32, n_routed_experts=2, num_experts_per_tok=1, sliding_window=40,
        max_position_embeddings=512, pad_token_id=0, mlp_layer_types=["dense", "sparse"],
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return hf.MiMoV2FlashForCausalLM(config)


@pytest.fixture(scope="module", params=[gpt_oss, mimo], ids=lambda make: make.__name__)
def net(request):
    """A layer with a sliding window and one without, with sinks that matter."""
    torch.manual_seed(0)
    net = request.param().eval()
    for sinks in of_layers(net):
        torch.nn.init.normal_(sinks, mean=2.0)
    return net


def of_layers(net):
    sinks = [layer.self_attn.sinks for layer in net.model.layers]
    return [each for each in sinks if each is not None]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_as_eager(net, padding):
    tokens = ids()
    seen = torch.ones_like(tokens)
    if padding == "right":
        seen[0, 100:] = 0
    if padding == "left":
        seen[1, :60] = 0
    calls = []
    found = run(net, "sparse_fmha", calls, input_ids=tokens, attention_mask=seen)
    wanted = run(net, "eager", [], input_ids=tokens, attention_mask=seen)
    torch.testing.assert_close(found[seen.bool()], wanted[seen.bool()], rtol=1e-4, atol=1e-5)
    whole = ["neighborhood_attention", "attention"]
    assert calls == (whole if padding == "none" else ["block_sparse_attention"] * 2)


def test_the_sinks_matter(net):
    tokens = ids()
    found = run(net, "sparse_fmha", [], input_ids=tokens)
    kept = [sinks.detach().clone() for sinks in of_layers(net)]
    try:
        for sinks in of_layers(net):
            sinks.data.fill_(-torch.inf)
        without = run(net, "sparse_fmha", [], input_ids=tokens)
    finally:
        for sinks, own in zip(of_layers(net), kept, strict=True):
            sinks.data.copy_(own)
    assert (found - without).abs().max() > 1e-3


@pytest.mark.parametrize("padded", [False, True])
def test_generation_token_by_token(net, padded):
    """Past the sliding window."""
    tokens = ids(60)
    seen = torch.ones_like(tokens)
    if padded:
        tokens[0, :20], seen[0, :20] = 0, 0
    assert_generates_as_eager(net, tokens, seen, atol=1e-5)


def test_gradients_of_the_sinks(net):
    tokens = ids(70)
    found = []
    for implementation in ("eager", "sparse_fmha"):
        net.set_attn_implementation(implementation)
        net.zero_grad()
        net(tokens, labels=tokens).loss.backward()
        found.append([sinks.grad.clone() for sinks in of_layers(net)])
    net.zero_grad()
    for a, b in zip(*found, strict=True):
        assert a.ne(0).any()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_a_layer_with_a_sparse_method(net):
    layers = enumerate(net.model.layers)
    last = max(n for n, layer in layers if layer.self_attn.sinks is not None)
    sparse.register("sparse_by_layer", {f"layer {last}": {"method": "anchor"}})
    with pytest.raises(
        NotImplementedError,
        match=f"layer {last} has a sparse method, which supports only causal prefill, with",
    ):
        run(net, "sparse_by_layer", [], input_ids=ids(100))
