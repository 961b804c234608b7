"""Enabled models of diffusers whose weights are cast, offloaded or adapted by other code."""

import pytest
import torch

pytest.importorskip("diffusers.hooks")

from diffusers import hooks
from diffusion_state import windowed
from tiny_diffusion import make

from sparse_fmha.integrations import diffusers as sparse

pytestmark = pytest.mark.parametrize("ours", ["first", "last"])


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def offload(model, **options):
    cpu = torch.device("cpu")
    try:
        hooks.apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **options)
    except AttributeError:  # diffusers 0.37 asks for the accelerator's type
        if torch.accelerator.is_available():
            raise
        pytest.skip("this version offloads only where there is an accelerator")


def offload_blocks(model):
    offload(model, offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(model):
    offload(model, offload_type="leaf_level")


def adapt(model):
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.1)


def quantize(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def offload_by_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    "wrap", [cast, offload_blocks, offload_leaves, offload_by_accelerate, adapt, quantize]
)
def test_the_same_window(wrap, ours):
    """Whichever came first, and without it the model is what the other code made of it."""
    tiny, plain = make("wan"), make("wan")
    for step in ("first", "last"):
        windowed(tiny) if ours == step else wrap(tiny.model)
    wrap(plain.model)
    dense = plain()
    windowed(plain)
    assert tiny().equal(plain())
    assert not tiny().equal(dense)
    sparse.disable(tiny.model)
    assert tiny().equal(dense)


def test_training_an_adapter(ours):
    tiny, plain = make("wan"), make("wan")
    for step in ("first", "last"):
        windowed(tiny) if ours == step else adapt(tiny.model)
    adapt(plain.model)
    windowed(plain)

    def gradients(tiny):
        tiny.model(**tiny.inputs, return_dict=False)[0].square().mean().backward()
        named = sorted(tiny.model.named_parameters())
        return [p.grad for name, p in named if "lora_" in name and "attn1" in name]

    found, expected = gradients(tiny), gradients(plain)
    assert len(found) == 2 * 2 * 4
    assert all(a.equal(b) and a.any() for a, b in zip(found, expected, strict=True))
