"""LTX-2.5's diffusion decoder: what diffusers computes with FlexAttention, from our op."""

import copy
import pickle
import warnings

import pytest
import torch

pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")

from tiny_decoder import BLOCKS, attentions, decode, decoder

from sparse_fmha import reference
from sparse_fmha.integrations import diffusers as sparse

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def original():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FlexAttention that is not compiled
        return decode(decoder())


@torch.no_grad()
def test_it_is_the_original(original):
    model = decoder()
    sparse.enable_decoder(model)
    kinds = {type(layer.processor).__name__ for layer in attentions(model)}
    assert kinds == {"DecoderProcessor"}
    close(decode(model), original)


@torch.no_grad()
@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_block_has_its_window(original, block):
    """With another window in one block the result is another: close() sees each block."""
    model = decoder()
    sparse.enable_decoder(model)
    attentions(model)[block].kernel_size = (1, 3, 3)
    assert (decode(model) - original).abs().max() > 1e-2


@torch.no_grad()
def test_several_steps():
    model = decoder()
    expected = decode(model, num_inference_steps=2)
    sparse.enable_decoder(model)
    close(decode(model, num_inference_steps=2), expected)


@torch.no_grad()
def test_tiles(original):
    """Tiles in time, which overlap."""
    model = decoder()
    # In frames of the video.
    model.enable_tiling(tile_sample_min_num_frames=8, tile_sample_stride_num_frames=4)
    expected = decode(model)
    assert not expected.equal(original)
    sparse.enable_decoder(model)
    close(decode(model), expected)


def masked(attn, hidden_states, block_mask=None):
    """A processor of torch's attention: FlexAttention has no backward pass on the CPU."""
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in attn.project_qkv(hidden_states))
    visible = reference.neighborhood_mask(hidden_states.shape[1:4], attn.kernel_size)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=1.0)
    return attn.to_out[0](out.transpose(1, 2).reshape(hidden_states.shape))


def test_gradients():
    """Of the weights of all blocks."""
    models = decoder(), decoder()
    for layer in attentions(models[0]):
        layer.processor = masked
    sparse.enable_decoder(models[1])
    for model in models:
        decode(model).square().mean().backward()
    for expected, got in zip(*map(attentions, models), strict=True):
        size = expected.to_q.weight.grad.norm()
        assert size > 0
        close(got.to_q.weight.grad / size, expected.to_q.weight.grad / size)


@torch.no_grad()
def test_disable_puts_back_the_same_processors(original):
    model = decoder()
    before = [layer.processor for layer in attentions(model)]
    sparse.enable_decoder(model)
    sparse.enable_decoder(model)  # stays so
    sparse.disable_decoder(model)
    after = [layer.processor for layer in attentions(model)]
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert decode(model).equal(original)
    with pytest.raises(
        RuntimeError, match="LTX2VideoDiffusionDecoderModel must be enabled, with its attention"
    ):
        sparse.disable_decoder(model)


@torch.no_grad()
def test_copies_are_enabled(original):
    model = decoder()
    sparse.enable_decoder(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(decode(copied), original)
        sparse.disable_decoder(copied)
        assert type(attentions(model)[0].processor).__name__ == "DecoderProcessor"


def test_a_pipeline():
    class Pipeline:
        diffusion_decoder = decoder()

    sparse.enable_decoder(Pipeline())
    assert type(attentions(Pipeline.diffusion_decoder)[-1].processor).__name__ == "DecoderProcessor"


def test_others_are_refused():
    for other in (torch.nn.Linear(2, 2), object(), None):
        with pytest.raises(
            TypeError,
            match="pipe_or_decoder must be a LTX2VideoDiffusionDecoderModel of diffusers or",
        ):
            sparse.enable_decoder(other)
    model = decoder()
    attentions(model)[3].processor = lambda attn, x, mask: x
    with pytest.raises(
        NotImplementedError, match=r"of block 3 of .* must be one of .*, got function"
    ):
        sparse.enable_decoder(model)
    assert type(attentions(model)[0].processor).__name__ == "LTX2VideoVaeNeighborhoodAttnProcessor"
