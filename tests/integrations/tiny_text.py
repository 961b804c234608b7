"""Tiny random text models of transformers."""

import pytest
import torch
import transformers as hf

from sparse_fmha.integrations import transformers as sparse

SMALL = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
DECODER = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=40)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
}


def model(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def ids(length=150, batch=2, seed=0):
    return torch.randint(1, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def noted(monkeypatch, module, name):
    """The options of each call of a function."""
    calls, function = [], getattr(module, name)

    def run(*args, **options):
        calls.append(options)
        return function(*args, **options)

    monkeypatch.setattr(module, name, run)
    return calls


@torch.no_grad()
def run(net, implementation, calls, **inputs):
    """The first output of a model; `calls` gets the names of our functions that it called."""
    net.set_attn_implementation(implementation)
    with pytest.MonkeyPatch.context() as patch:
        ours = "attention", "neighborhood_attention", "block_sparse_attention"
        for name in (*ours, "sdpa_attention_forward"):
            function = getattr(sparse, name)

            def noted(*args, function=function, name=name, **kwargs):
                calls.append(name)
                return function(*args, **kwargs)

            patch.setattr(sparse, name, noted)
        return net(**inputs)[0]


def assert_generates_as_eager(net, tokens, seen, atol):
    """Eight tokens, one by one: the same as with eager attention, from logits as close as atol."""
    options = {"attention_mask": seen, "max_new_tokens": 8, "do_sample": False}
    results = []
    for implementation in ("eager", "sparse_fmha"):
        net.set_attn_implementation(implementation)
        results.append(
            net.generate(tokens, **options, return_dict_in_generate=True, output_logits=True)
        )
    assert results[0].sequences.equal(results[1].sequences)
    for a, b in zip(results[0].logits, results[1].logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
