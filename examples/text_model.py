"""A random small Llama with sparse methods by layer, beside torch's attention. On a CPU in seconds:

pip install sparse-fmha[transformers]
python examples/text_model.py [--tokens 4096]
"""

from __future__ import annotations

import argparse
import time

import torch

from sparse_fmha.cli import one_line_errors

with one_line_errors(install="sparse-fmha[transformers]"):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparse_fmha.integrations import transformers as sparse

LAYERS = {
    "default": {"method": "dense"},
    "layers 1-3": {"method": "block_topk", "blocks": 4},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0].partition(" On a")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the prompt")
    return p


def main(argv: list[str] | None = None) -> None:
    length = parser().parse_args(argv).tokens
    if length < 1:
        raise ValueError(f"--tokens must be at least 1, got {length}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 1000, (1, length), device="cpu")
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
    with one_line_errors():
        main()
