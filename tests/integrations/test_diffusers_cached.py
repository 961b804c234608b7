"""References of Flux 2 whose keys are cached: the queries are fewer than the keys."""

import pytest
import torch

pytest.importorskip("diffusers.models.transformers.transformer_flux2")

from diffusers.models.transformers import transformer_flux2 as module
from tiny_diffusion import BATCH, torch_attention_with
from tiny_diffusion_models import all_blocks, close, differs, make

from sparse_fmha import reference
from sparse_fmha.integrations import diffusers as sparse

REFERENCES = 12
pytestmark = pytest.mark.skipif(
    not hasattr(module, "Flux2KVAttnProcessor"), reason="no cache of references in this version"
)


def tiny_with_cache():
    tiny = make("flux2")
    for block in tiny.model.transformer_blocks:
        block.attn.set_processor(module.Flux2KVAttnProcessor())
    for block in tiny.model.single_transformer_blocks:
        block.attn.set_processor(module.Flux2KVParallelSelfAttnProcessor())
    return tiny


def both_steps(tiny):
    """The first fills the cache, the second reads it."""
    ids = tiny.inputs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    places = torch.cartesian_prod(
        torch.tensor([10]), torch.arange(3), torch.arange(4), torch.tensor([0])
    ).to(ids)
    torch.manual_seed(1)
    latents = torch.randn(BATCH, REFERENCES, tiny.inputs["hidden_states"].shape[-1])
    first = {
        **tiny.inputs,
        "hidden_states": torch.cat([latents, tiny.inputs["hidden_states"]], 1),
        "img_ids": torch.cat([places, ids]),
        "kv_cache_mode": "extract",
        "num_ref_tokens": REFERENCES,
    }
    with torch.no_grad():
        out, cache = tiny.model(**first, return_dict=False)
        later = {**tiny.inputs, "kv_cache": cache, "kv_cache_mode": "cached"}
        return out, tiny.model(**later, return_dict=False)[0]


def visible(tiny, window):
    """Text and references are seen by all; the queries are those of text and image."""
    image = reference.neighborhood_mask(tiny.grid, window)
    return torch.nn.functional.pad(image, (tiny.text + REFERENCES, 0, tiny.text, 0), value=True)


@pytest.mark.parametrize("method", ["neighborhood", "block_sparse", "dense"])
def test_both_steps(method):
    tiny = tiny_with_cache()
    dense = expected = both_steps(tiny)
    options = {"mask": all_blocks} if method == "block_sparse" else {}
    if method == "neighborhood":
        options = {"window": tiny.window}
        with torch_attention_with(visible(tiny, tiny.window)) as seen:
            expected = both_steps(tiny)
        assert len(seen) == 2 * tiny.layers
        differs(expected[1], dense[1])
    sparse.enable(tiny.model, method, **options)
    for found, wanted in zip(both_steps(tiny), expected, strict=True):
        close(found, wanted)


def test_without_references_and_without_a_cache():
    tiny = tiny_with_cache()
    with torch_attention_with(tiny.visible(tiny.window)):
        expected = tiny()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    close(tiny(), expected)


def test_methods_of_all_tokens_refuse():
    tiny = tiny_with_cache()
    sparse.enable(tiny.model, "psa")
    with pytest.raises(
        NotImplementedError, match=r"keys without queries .* are not supported by PSA"
    ):
        both_steps(tiny)
