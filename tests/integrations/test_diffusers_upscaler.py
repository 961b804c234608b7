"""Kandinsky 6 SR: its own NABLA, from our op."""

import copy

import pytest
import torch

pytest.importorskip("diffusers.models.transformers.transformer_kandinsky6_sr")

from diffusers import Kandinsky6SRTransformer3DModel
from diffusers.models.transformers import transformer_kandinsky6_sr as module

from sparse_fmha.integrations import diffusers as sparse

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def upscaler(**options):
    """Its grid has 3x2x2 blocks of 8x8 tokens."""
    torch.manual_seed(0)
    model = Kandinsky6SRTransformer3DModel(
        in_visual_dim=2, out_visual_dim=4, time_dim=8, model_dim=32, ff_dim=32,
        num_visual_blocks=2, axes_dims=(4, 6, 6), nabla_window=(1, 1, 1),
        **{"nabla_threshold": 0.5, **options},
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        sharp = name.endswith(("query_norm.weight", "key_norm.weight"))
        torch.nn.init.normal_(parameter, mean=3.0 if sharp else 0.0, std=0.25)
    return model.eval()


def call(model):
    latents = torch.randn(2, 3, 16, 16, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(latents, torch.full((2,), 700.0), return_dict=False)[0]


def kinds(model):
    return {type(b.self_attention.processor).__name__ for b in model.visual_transformer_blocks}


@pytest.fixture(scope="module")
def original():
    """Not compiled, FlexAttention leaves the lists of blocks out: here they are pairs."""
    own, densities = module.nabla_block_mask, []

    def pairs(*args, **options):
        blocks = own(*args, **options).to_dense().bool()
        densities.append(blocks.float().mean())
        return blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "nabla_block_mask", pairs)
        expected = call(upscaler())
    assert len(densities) == 2
    assert all(0.1 < density < 0.9 for density in densities)
    return expected


def test_it_is_the_original(original):
    model = upscaler()
    dense = call(model)
    sparse.enable_upscaler(model)
    sparse.enable_upscaler(model)  # stays so
    assert kinds(model) == {"UpscalerProcessor"}
    torch.testing.assert_close(call(model), original, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call(copy.deepcopy(model)), original, rtol=1e-4, atol=1e-4)
    assert (original - dense).abs().max() > 1e-2
    sparse.disable_upscaler(model)
    assert kinds(model) == {"Kandinsky6SRAttnProcessor"}
    with pytest.raises(RuntimeError, match=r"must be enabled, .* call enable_upscaler\(\) first"):
        sparse.disable_upscaler(model)


def test_a_pipeline(original):
    class Pipeline:
        transformer = upscaler()

    sparse.enable_upscaler(Pipeline())
    torch.testing.assert_close(call(Pipeline.transformer), original, rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    with pytest.raises(
        TypeError, match="pipe_or_upscaler must be a Kandinsky6SRTransformer3DModel of diffusers or"
    ):
        sparse.enable_upscaler(torch.nn.Linear(2, 2))
    model = upscaler()
    model.visual_transformer_blocks[1].self_attention.processor = lambda *args: args[0]
    with pytest.raises(NotImplementedError, match=r"of block 1 of .* must be one of .*, got func"):
        sparse.enable_upscaler(model)
    assert "UpscalerProcessor" not in kinds(model)
    model = upscaler()
    sparse.enable_upscaler(model)
    model.visual_transformer_blocks[0].self_attention.processor.original._parallel_config = object()
    with pytest.raises(NotImplementedError, match="context parallelism of Kandinsky6SRTransformer"):
        call(model)
