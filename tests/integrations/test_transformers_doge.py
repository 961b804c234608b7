"""Doge, whose layers compute trainable dynamic mask attention from a mask of all pairs."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from sparse_fmha import patterns  # noqa: E402

KEEP, TOKENS = 40, 200
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@pytest.fixture
def net():
    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=TOKENS, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, keep_window_size=KEEP,
        max_position_embeddings=512,
    )  # fmt: skip
    made = transformers.DogeForCausalLM(config).eval()
    layer = made.model.layers[0].self_attn
    torch.nn.init.normal_(layer.A)
    torch.nn.init.normal_(layer.dt_proj.weight)  # biases that rounding does not make equal
    return made


@pytest.mark.usefixtures("registered")
def test_the_model_says_why_it_does_not_run(net):
    net.set_attn_implementation("sparse_fmha")
    with pytest.raises(AttributeError, match="computes with the numbers of its mask"):
        net(torch.arange(TOKENS)[None])


@pytest.mark.skipif(VERSION < (5, 24), reason="older versions make the layer's mask otherwise")
def test_dma_attention_is_what_a_layer_computes(net):
    """The weights of a layer in a `DMABias`, against the attention of the model itself."""
    layer = net.model.layers[0].self_attn
    seen = {}

    def attend(module, q, k, v, attention_mask, **_):
        seen.update(q=q, k=k, v=v)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        seen["out"] = out.transpose(1, 2)
        return seen["out"], None

    def whole(*args, **options):  # some versions leave out a mask that is causal alone
        options["allow_is_causal_skip"] = False
        return transformers.masking_utils.sdpa_mask(*args, **options)

    transformers.AttentionInterface.register("recorded", attend)
    transformers.AttentionMaskInterface.register("recorded", whole)
    net.set_attn_implementation("recorded")
    with torch.no_grad():
        net(torch.stack([torch.randperm(TOKENS) for _ in range(2)]))  # one token twice has one bias
        q, k, v = (seen[name].transpose(1, 2) for name in "qkv")
        bias = patterns.DMABias(2, v.shape[-1])
        bias.weight.copy_(layer.dt_proj.weight)
        bias.decay.copy_(layer.A)
        found, half = (patterns.dma_attention(q, k, v, bias(v), n) for n in (KEEP, KEEP // 2))
    differ, differ_half = (
        ((out - seen["out"]).abs() > 1e-5).any(-1).float().mean() for out in (found, half)
    )
    assert differ < 0.02  # where two biases are equal, a row keeps both
    assert differ_half > 0.5
