"""Llama 4's chunks, Gemma's windows and its images: as eager attention, over lists."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_text import DECODER, ids, run
from transformers import masking_utils

from sparse_fmha.integrations import _transformers_masks as masks

pytestmark = pytest.mark.usefixtures("registered")


def llama4():
    config = hf.Llama4TextConfig(
        **DECODER, head_dim=16, intermediate_size_mlp=64, num_local_experts=2,
        attention_chunk_size=48, no_rope_layers=[1, 0],
    )  # fmt: skip
    return hf.Llama4ForCausalLM(config)


def gemma2():
    config = hf.Gemma2Config(**DECODER, head_dim=16, sliding_window=40, attn_logit_softcapping=None)
    return hf.Gemma2ForCausalLM(config)


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**DECODER, head_dim=16, sliding_window=40, layer_types=kinds)
    return hf.Gemma3ForCausalLM(config)


@pytest.mark.parametrize("make", [llama4, gemma2, gemma3])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_as_eager(make, padding):
    torch.manual_seed(0)
    net, tokens = make().eval(), ids()
    seen = torch.ones_like(tokens)
    if padding == "right":
        seen[0, 100:] = 0
    if padding == "left":
        seen[1, :60] = 0
    inputs = {"input_ids": tokens, "attention_mask": seen, "use_cache": False}
    calls, real = [], seen.bool()
    found = run(net, "sparse_fmha", calls, **inputs)
    wanted = run(net, "eager", [], **inputs)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    lists = "block_sparse_attention"
    if padding != "none":
        assert calls == [lists] * 2
    elif make is llama4:
        assert calls == [lists, "attention"]
    else:
        assert calls == ["neighborhood_attention", "attention"]


def images():
    """Gemma 3 with image tokens, which see each other; what they hold does not matter."""
    kinds = ["sliding_attention", "full_attention"]
    text = hf.Gemma3TextConfig(**DECODER, head_dim=16, sliding_window=40, layer_types=kinds)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=0
    )
    return hf.Gemma3ForConditionalGeneration(config)


def paligemma():
    text = hf.GemmaConfig(**DECODER, head_dim=16)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = hf.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_token_index=0
    )
    return hf.PaliGemmaForConditionalGeneration(config)


@pytest.mark.skipif(
    not hasattr(masking_utils, "blockwise_overlay"),
    reason="this version of transformers has no such masks",
)
@pytest.mark.parametrize("make", [images, paligemma])
@pytest.mark.parametrize("padded", [False, True])
def test_image_tokens_see_each_other(make, padded, monkeypatch):
    monkeypatch.setattr(masks, "_evaluated", None)  # not at all pairs
    torch.manual_seed(0)
    net, tokens = make().eval(), ids()
    kinds, seen = torch.zeros_like(tokens), torch.ones_like(tokens)
    if make is paligemma:
        kinds[:] = 1  # 0 is what sees each other: image and prompt
        kinds[0, :90], kinds[1, 30:60] = 0, 0
    else:
        kinds[0, 10:80], kinds[0, 100:], kinds[1, 70:90] = 1, 1, 1
    if padded:
        seen[1, :30] = 0
    inputs = {"input_ids": tokens, "attention_mask": seen, "use_cache": False}
    calls, real = [], seen.bool()
    found = run(net, "sparse_fmha", calls, token_type_ids=kinds, **inputs)
    wanted = run(net, "eager", [], token_type_ids=kinds, **inputs)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert calls == ["block_sparse_attention"] * 2
    others = torch.zeros_like(kinds) if make is images else torch.ones_like(kinds)
    causal = run(net, "eager", [], token_type_ids=others, **inputs)
    assert (causal - wanted)[real].abs().max() > 1e-3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [48, 128, 150, 1000])
def test_chunks_are_lists_without_a_look_at_all_pairs(monkeypatch, chunk, padded):
    monkeypatch.setattr(masks, "_evaluated", None)
    skipped = torch.tensor([0, 60 if padded else 0])
    seen = torch.ones(2, 300, dtype=torch.bool)
    seen[1, : skipped[1]] = False
    function = masking_utils.chunked_causal_mask_function(chunk, skipped)
    plan = masks.plan(2, 300, 300, mask_function=function, attention_mask=seen)
    place = torch.arange(300)
    chunks = (place - skipped[:, None]).div(chunk, rounding_mode="floor")
    wanted = (chunks[:, :, None] == chunks[:, None]) & (place <= place[:, None])
    wanted &= seen[:, None]
    if chunk == 1000 and not padded:
        assert (plan.causal, plan.mask) == (True, None)
    else:
        assert plan.mask.to_dense()[:, 0].equal(wanted)
    assert plan.special in ("chunked attention", None)


def test_chunks_behind_a_cache_are_evaluated():
    function = masking_utils.chunked_causal_mask_function(48, torch.tensor([0]))
    plan = masks.plan(1, 60, 100, q_offset=40, mask_function=function)
    queries, keys = torch.arange(40, 100)[:, None], torch.arange(100)
    wanted = (queries // 48 == keys // 48) & (keys <= queries)
    assert plan.mask.to_dense()[0, 0].equal(wanted)


def test_methods_refuse_chunked_layers():
    from sparse_fmha.integrations import transformers as sparse

    sparse.register("chunks_and_methods", {"default": {"method": "skip", "threshold": 0.1}})
    net = llama4().eval()
    net.set_attn_implementation("chunks_and_methods")
    with pytest.raises(NotImplementedError, match=r"layer 0 .* got chunked attention; give"):
        net(ids())
