"""A random small Llama with sparse methods by layer, beside torch's attention. On a CPU in seconds:

pip install sparse-fmha[transformers]
python examples/text_model.py
"""

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_fmha.integrations import transformers as sparse

TOKENS = 4096
LAYERS = {
    "default": {"method": "dense"},
    "layers 1-3": {"method": "block_topk", "blocks": 4},
}


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 1000, (1, TOKENS), device="cpu")
    sparse.register()
    sparse.register("sparse_by_layer", LAYERS)
    results = {}
    for name in ("sdpa", "sparse_fmha", "sparse_by_layer"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            model(tokens[:, :256])
            start = time.perf_counter()
            results[name] = model(tokens, use_cache=False).logits
        error = (results[name] - results["sdpa"]).norm() / results["sdpa"].norm()
        print(f"{name:16} {time.perf_counter() - start:6.2f} s, relative error {error:.1e}")


if __name__ == "__main__":
    main()
