"""Layers of a model on several devices: what they see follows them, as accelerate's hooks move it.

There is one device that computes here, so layers on the second one, `meta`, have no kernels: what
reaches them is looked at, and an answer is made.
"""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers as hf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from sparse_fmha.integrations import transformers as sparse

SIZES = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
MODELS = {
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**SIZES)),
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(**SIZES, sliding_window=40)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES), add_pooling_layer=False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["left", "right", "between"])
@pytest.mark.parametrize("first", [1, 2])
def test_padded_batches_of_a_model_on_two_devices(monkeypatch, name, padding, first):
    """The layers from `first` on are on the other device."""
    sparse.register()
    model = MODELS[name]().eval()
    model.set_attn_implementation("sparse_fmha")
    layers = model.encoder.layer if name == "bert" else model.layers
    for layer in layers[first:]:
        layer.to("meta")
        add_hook_to_module(layer, AlignDevicesHook(execution_device="meta"))
    if name != "bert":
        add_hook_to_module(model.norm.to("meta"), AlignDevicesHook(execution_device="meta"))
    seen = []
    compute = sparse.block_sparse_attention

    def attend(q, k, v, mask, **options):
        assert mask.device == q.device
        seen.append(q.device.type)
        return torch.empty_like(q) if q.is_meta else compute(q, k, v, mask, **options)

    monkeypatch.setattr(sparse, "block_sparse_attention", attend)
    tokens = torch.randint(1, 90, (2, 150))
    real = torch.ones_like(tokens)
    places = {"left": slice(0, 60), "right": slice(100, 150), "between": slice(50, 70)}
    real[1, places[padding]] = 0
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=real)
    assert seen == ["cpu"] * first + ["meta"] * (3 - first)


def test_a_plan_says_where_it_is_not():
    """Without hooks the error names both devices."""
    real = torch.ones(2, 150, dtype=torch.bool)
    real[0, :60] = False
    mask = sparse.plan(2, 150, 150, attention_mask=real).mask
    q = torch.randn(2, 150, 4, 16)
    with pytest.raises(ValueError, match="mask must be on q's device, cpu, got meta"):
        sparse.block_sparse_attention(q, q, q, mask.to("meta"))
