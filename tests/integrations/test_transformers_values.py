"""DeepSeek-V3, whose values have fewer numbers than its keys, beside eager attention."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_text import DECODER, assert_generates_as_eager, ids, run

from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    given = {**DECODER, "num_key_value_heads": 4}
    config = hf.DeepseekV3Config(
        **given, moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    return hf.DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_as_eager(net, padded):
    tokens = ids()
    seen = torch.ones_like(tokens)
    if padded:
        seen[1, :60] = 0
    calls = []
    found = run(net, "sparse_fmha", calls, input_ids=tokens, attention_mask=seen)
    wanted = run(net, "eager", [], input_ids=tokens, attention_mask=seen)
    torch.testing.assert_close(found[seen.bool()], wanted[seen.bool()], rtol=1e-4, atol=1e-5)
    assert calls == ["block_sparse_attention" if padded else "attention"] * 2


def test_generation_token_by_token(net):
    tokens = ids(60)
    assert_generates_as_eager(net, tokens, torch.ones_like(tokens), atol=1e-5)


def test_a_layer_with_a_sparse_method(net):
    """One that leaves nothing out."""
    sparse.register("values_by_layer", {"layer 1": {"method": "streaming_llm", "window": 2000}})
    tokens = ids()
    with pytest.warns(UserWarning, match="no effect"):
        found = run(net, "values_by_layer", [], input_ids=tokens)
    wanted = run(net, "eager", [], input_ids=tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
