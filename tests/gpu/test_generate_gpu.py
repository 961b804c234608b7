"""transformers' continuous batching on the GPU: the tokens of torch's attention."""

import dataclasses
import inspect

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from transformers.generation.continuous_batching import PagedAttentionCache

from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.gpu

VOCABULARY, STEPS = 90, 250
PROMPTS = (5, 140, 17, 90, 3, 61, 1, 33)  # tokens of each


def llama(device, dtype):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval().to(device, dtype)


def rows_of_a_page():
    """The option's name, which versions differ in."""
    names = {field.name for field in dataclasses.fields(hf.ContinuousBatchingConfig)}
    return "page_size" if "page_size" in names else "block_size"


def generated(net, prompts):
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    outputs = net.generate_batch(
        prompts,
        generation_config=hf.GenerationConfig(**options),
        continuous_batching_config=hf.ContinuousBatchingConfig(
            num_blocks=256, max_batch_tokens=256, **{rows_of_a_page(): 16}
        ),
    )
    return [outputs[key].generated_tokens for key in sorted(outputs)]


def test_a_thousand_tokens_over_ragged_requests(cuda):
    """Where two tokens' logits are as close as 16 bits allow, either may follow, and the request is
    compared up to there."""
    if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        pytest.skip(f"transformers {hf.__version__} calls the attention before the cache")
    sparse.register()
    net = llama(cuda, torch.float16)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS]
    net.set_attn_implementation("sdpa")
    wanted = generated(net, prompts)
    with sparse.continuous_batching(net):
        found = generated(net, prompts)
    exact = llama(cuda, torch.float32)
    agreed = 0
    for prompt, a, b in zip(prompts, wanted, found, strict=True):
        assert len(a) == len(b) == STEPS
        same = next((i for i in range(STEPS) if a[i] != b[i]), STEPS)
        agreed += same
        if same < STEPS:
            tokens = torch.tensor([prompt + a[:same]], device=cuda)
            with torch.no_grad():
                logits = exact(tokens).logits[0, -1]
            assert (logits[a[same]] - logits[b[same]]).abs() < 0.01 * logits.std()
    assert agreed >= 1000
