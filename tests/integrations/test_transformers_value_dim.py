"""DeepSeek-V3, whose values have another head dim than queries and keys: the numbers of its eager
attention in prefill."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from tiny_text import DECODER, ids, run

from sparse_fmha.integrations import transformers as sparse

LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    heads = DECODER["num_attention_heads"]
    sizes = DECODER | {"num_key_value_heads": heads} | LATENT | EXPERTS
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes)).eval()


@pytest.mark.parametrize("layers", [{}, {"default": {"method": "block_topk", "blocks": 99}}])
@pytest.mark.parametrize("padded", [False, True])
def test_as_eager(net, padded, layers):
    """Also by a sparse method that keeps all blocks."""
    tokens = ids()
    seen = torch.ones_like(tokens)
    if padded:
        seen[1, :60] = 0
    inputs = {"input_ids": tokens, "attention_mask": seen, "use_cache": False}
    sparse.register(**({"layers": layers} if layers else {}))
    try:
        found = run(net, "sparse_fmha", [], **inputs)
    finally:
        sparse.register()
    wanted = run(net, "eager", [], **inputs)
    real = seen.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
