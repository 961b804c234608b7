"""The bridge to diffusers on a GPU, in bf16: tiny models against themselves in fp32 on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers.models.transformers.transformer_kandinsky6")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integrations"))

import tiny_decoder
import tiny_diffusion
import tiny_diffusion_models

from sparse_fmha.integrations import diffusers as sparse

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NAMES = ("wan", "hunyuan_video", "flux", "ltx", "minimax_h3", "flux2", "krea2", "framepack",
         "chroma", "cosmos3")  # fmt: skip
METHODS = {
    "dense": {},
    "sol": {"tau": 0.5},
    "cube_top_k": {"keep": (0.3, 1.0)},
    "subblock": {"keep": (0.5, 1.0)},
    "skip": {"threshold": 0.0},
}


def make(name, **options):
    found = tiny_diffusion if name in tiny_diffusion.MAKERS else tiny_diffusion_models
    return found.make(name, **options)


def moved(tiny):
    """To the GPU and bf16, but for what models keep exact."""
    for name, parameter in tiny.model.named_parameters():
        kept = set(tiny.model._keep_in_fp32_modules or ())
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    tiny.model.to(DEVICE)
    exact = ("img_ids", "txt_ids", "timestep", "position_ids")
    for name, given in tiny.inputs.items():
        several = isinstance(given, list)
        tensors = given if several else [given]
        if isinstance(tensors[0], torch.Tensor):
            wide = not tensors[0].is_floating_point() or name in exact
            own = [x.to(DEVICE, None if wide else torch.bfloat16) for x in tensors]
            tiny.inputs[name] = own if several else own[0]
    return tiny


def difference(out, expected):
    expected = expected.double().cpu()
    return ((out.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NAMES)
def test_windows_are_as_exact_as_the_model(name):
    """The error of bf16 is not larger than that of the model with torch's attention."""
    tiny, gpu = make(name), moved(make(name))
    base = difference(gpu(), tiny())
    for model in (tiny.model, gpu.model):
        sparse.enable(model, "neighborhood", **tiny.options, min_tokens=0)
    expected = tiny()
    assert difference(gpu(), expected) <= 2 * base + 0.01
    sparse.disable(gpu.model)
    assert difference(gpu(), expected) > 2 * base + 0.01


@pytest.mark.parametrize("method", METHODS)
def test_methods(method):
    tiny, gpu = make("wan"), moved(make("wan"))
    base = difference(gpu(), tiny())
    latents = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for each in (tiny, gpu):
        sparse.enable(each.model, method, **METHODS[method], min_tokens=0)
    # Choices by scores may differ in bf16 where these are close.
    room = 0.2 if method in ("sol", "cube_top_k", "subblock") else 0.01
    out = gpu(hidden_states=latents.to(DEVICE, torch.bfloat16))
    assert difference(out, tiny(hidden_states=latents)) <= 2 * base + room


def test_layers_and_compiled_blocks():
    """By inductor, in one graph for each method and one for the original."""
    gpu = moved(make("wan", layers=4))
    layers = {"layer 0": {"method": "neighborhood", "window": gpu.window},
              "layers 1-2": {"method": "cube_top_k", "keep": 0.5}}  # fmt: skip
    sparse.enable(gpu.model, layers=layers, min_tokens=0)
    expected = gpu()
    torch.compiler.reset()
    gpu.model.compile_repeated_blocks(fullgraph=True)
    assert difference(gpu(), expected) < 0.02
    assert difference(gpu(400), gpu(400)) == 0
    torch.compiler.reset()


def test_calibrated_budgets_load(tmp_path):
    gpu = moved(make("wan"))
    found = sparse.calibrate(gpu.model, [gpu, lambda: gpu(400)], error=0.3, values=(0.25, 0.5))
    sparse.enable(gpu.model, preset=found.save(tmp_path / "a.json"), min_tokens=0)
    with sparse.record(gpu.model, error=True) as recording:
        gpu(400)
    assert recording.density.shape == recording.error.shape == (2, 2)
    assert (recording.error[0] <= 0.45).all()


def test_the_decoder_of_ltx():
    """In bf16 beside itself in fp32 on the CPU, both by our kernels."""
    model, gpu = tiny_decoder.decoder(), tiny_decoder.decoder().to(DEVICE, torch.bfloat16)
    for each in (model, gpu):
        sparse.enable_decoder(each)
    z = tiny_decoder.latents()
    with torch.no_grad():
        noise = torch.Generator("cpu").manual_seed(2)
        expected = model(z, generator=noise, return_dict=False)[0]
        noise = torch.Generator("cpu").manual_seed(2)
        out = gpu(z.to(DEVICE, torch.bfloat16), generator=noise, return_dict=False)[0]
    assert difference(out, expected) < 0.1
