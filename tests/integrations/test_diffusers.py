"""Sparse attention in the transformers of diffusers, against torch's attention under a mask."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_diffusion import BATCH, MAKERS, TEXT, make, torch_attention_with

import sparse_fmha
from sparse_fmha.integrations import diffusers as sparse

MODELS = list(MAKERS)


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def differs(out, expected):
    assert (out - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.fixture(params=MODELS)
def tiny(request):
    return make(request.param)


def test_window_of_the_whole_grid_is_the_original(tiny):
    expected = tiny()
    sparse.enable(tiny.model, "neighborhood", window=tiny.grid)
    out = tiny()
    assert not out.equal(expected)  # other kernels ran
    close(out, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plain", [True, False], ids=["window", "window_stride_dilation"])
def test_window_is_masked_torch_attention(name, plain):
    tiny = make(name)
    options = {"window": tiny.window} if plain else tiny.options
    dense = tiny()
    with torch_attention_with(tiny.visible(**options)) as seen:
        expected = tiny()
    assert len(seen) == tiny.layers
    differs(expected, dense)
    sparse.enable(tiny.model, "neighborhood", **options)
    close(tiny(), expected)


def test_dense_is_the_original(tiny):
    expected = tiny()
    sparse.enable(tiny.model, "dense")
    out = tiny()
    assert not out.equal(expected)
    close(out, expected)


@pytest.mark.parametrize("method", ["neighborhood", "block_sparse", "dense"])
def test_bfloat16(tiny, method):
    """The error to fp32 is that of the original in bfloat16."""
    options = {"neighborhood": {"window": tiny.grid}, "block_sparse": {"mask": all_blocks}}
    exact = tiny()
    for parameter in tiny.model.parameters():
        parameter.data = parameter.data.bfloat16()
    kept = ("timestep", "img_ids", "txt_ids")
    for name, x in tiny.inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name not in kept:
            tiny.inputs[name] = x.bfloat16()
    allowed = 2 * (tiny().float() - exact).norm()
    sparse.enable(tiny.model, method, **options.get(method, {}))
    out = tiny()
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < allowed


def all_blocks(q, k):
    grid = sparse_fmha.BlockGrid.of(q, k, 64, 32)
    return grid.mask(grid.reachable())


def test_all_blocks_are_the_original(tiny):
    expected = tiny()
    shapes = []

    def mask(q, k):
        shapes.append((q.shape, k.shape))
        return all_blocks(q, k)

    sparse.enable(tiny.model, "block_sparse", mask=mask)
    close(tiny(), expected)
    assert shapes == [((BATCH, tiny.image, 2, 16),) * 2] * tiny.layers


def test_blocks_are_masked_torch_attention(tiny):
    blocks = torch.zeros(1, 1, -(-tiny.image // 64), -(-tiny.image // 16), dtype=torch.bool)
    blocks[..., 0, ::2] = True
    blocks[..., 1, 1::2] = True
    mask = sparse_fmha.BlockMask.from_blocks(blocks, tiny.image, tiny.image, 64, 16)
    dense = tiny()
    with torch_attention_with(tiny.with_text(mask.to_dense()[0, 0])):
        expected = tiny()
    differs(expected, dense)
    sparse.enable(tiny.model, "block_sparse", mask=mask)
    close(tiny(), expected)


def test_pooled_top_k(tiny):
    """The blocks are chosen from q and k of each layer, batch entry and head."""
    chosen = []

    def mask(q, k):
        grid = sparse_fmha.BlockGrid.of(q, k, 64, 16)
        scores = sparse_fmha.selection.block_scores(q, k, grid)
        chosen.append(grid.mask(sparse_fmha.selection.top_k_blocks(scores, 3)))
        return chosen[-1]

    dense = tiny()
    sparse.enable(tiny.model, "block_sparse", mask=mask)
    differs(tiny(), dense)
    assert len(chosen) == tiny.layers
    assert all(m.counts.shape[:2] == (BATCH, 2) and m.counts.eq(3).all() for m in chosen)


def test_disable_restores_exactly(tiny):
    expected, processors = tiny(), dict(tiny.model.attn_processors)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    assert sparse.is_enabled(tiny.model)
    differs(tiny(), expected)
    sparse.disable(tiny.model)
    assert not sparse.is_enabled(tiny.model)
    assert tiny().equal(expected)
    after = tiny.model.attn_processors
    assert after.keys() == processors.keys()
    assert all(after[name] is processors[name] for name in after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


def test_dense_layers_are_the_original(tiny):
    dense = tiny()
    with torch_attention_with(tiny.visible(tiny.window), layers=[1]):
        expected = tiny()
    differs(expected, dense)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, dense_layers=[0])
    close(tiny(), expected)
    sparse.disable(tiny.model)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, dense_layers=range(tiny.layers))
    assert tiny().equal(dense)


def test_first_dense_steps_are_the_original(tiny):
    """Two calls a step, as pipelines that call with and without the prompt; two runs."""
    times = [900, 900, 700, 700, 400, 400, 100, 100] * 2
    expected = [tiny(t) for t in times]
    with torch_attention_with(tiny.visible(tiny.window)):
        windowed = [tiny(t) for t in times]
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2)
    for i, t in enumerate(times):
        out = tiny(t)
        if i % 8 < 4:
            assert out.equal(expected[i])
        else:
            differs(windowed[i], expected[i])
            close(out, windowed[i])


@pytest.mark.parametrize("lengths", [(6, 6), (3, TEXT), (1, 7)], ids=str)
@pytest.mark.parametrize("method", ["neighborhood", "block_sparse", "dense"])
def test_padded_text_is_not_seen(method, lengths):
    """HunyuanVideo masks the padding of its text; entries of a batch may differ."""
    tiny = make("hunyuan_video", lengths=lengths)
    full = make("hunyuan_video")()
    options, visible = {}, tiny.visible(tiny.grid)
    if method == "neighborhood":
        options, visible = {"window": tiny.window}, tiny.visible(tiny.window)
    elif method == "block_sparse":
        options = {"mask": all_blocks}
    with torch_attention_with(visible):
        expected = tiny()
    differs(full, expected)
    sparse.enable(tiny.model, method, **options)
    close(tiny(), expected)


def test_temporal_patches_and_fused_projections_of_cogvideox():
    tiny = make("cogvideox", patch_size_t=2)
    tiny.model.fuse_qkv_projections()
    with torch_attention_with(tiny.visible(tiny.window)) as seen:
        expected = tiny()
    assert len(seen) == tiny.layers
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    close(tiny(), expected)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_fused_projections(name):
    tiny = make(name)
    with torch_attention_with(tiny.visible(tiny.window)):
        expected = tiny()
    tiny.model.fuse_qkv_projections()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    close(tiny(), expected)


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_hunyuan_video_from_an_image(kind):
    tiny = make("hunyuan_video", image_condition_type=kind)
    with torch_attention_with(tiny.visible(tiny.window)):
        expected = tiny()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    close(tiny(), expected)


def test_one_frame_needs_a_window_of_one_there():
    tiny = make("wan", frames=1)
    rows = sparse_fmha.reference.neighborhood_mask((5, 6), (3, 4))
    with torch_attention_with(rows):
        expected = tiny()
    sparse.enable(tiny.model, "neighborhood", window=(1, 3, 4))
    close(tiny(), expected)


def test_pipeline_with_two_transformers():
    """Wan 2.2: the second transformer goes on with the steps of the first."""

    class Pipeline:
        def __init__(self, *models):
            self.transformer, self.transformer_2 = models

    early, late = make("wan"), make("wan")
    pipe = Pipeline(early.model, late.model)
    dense = [late(t) for t in (700, 400)]
    sparse.enable(pipe, "neighborhood", window=early.window, first_dense_steps=2)
    assert sparse.is_enabled(pipe)
    early(900)
    assert late(700).equal(dense[0])
    differs(late(400), dense[1])
    sparse.disable(pipe)
    assert late(400).equal(dense[1])


def test_dense_steps_of_cogvideox_are_its_own():
    """Its processor calls torch whatever backend is active; so do dense steps, not sparse ones."""
    from diffusers.models.attention_dispatch import attention_backend

    tiny = make("cogvideox")
    expected = tiny()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=1)
    with attention_backend("_native_math"):
        assert tiny().equal(expected)


def test_steps_of_timesteps_that_differ_by_token():
    """Wan 2.2 from an image: the given frame has timestep 0 throughout."""
    tiny = make("wan")

    def at(t):
        tiny.inputs["timestep"] = torch.full((BATCH, tiny.image), t)
        tiny.inputs["timestep"][:, :30] = 0
        return tiny()

    expected = [at(t) for t in (900, 500)]
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=1)
    assert at(900).equal(expected[0])
    differs(at(500), expected[1])


def test_processors_that_modules_share():
    """One processor for self- and cross-attention: the latter stays as it is."""
    tiny = make("wan")
    expected = tiny()
    tiny.model.set_attn_processor(type(tiny.model.blocks[0].attn1.processor)())
    sparse.enable(tiny.model, "neighborhood", window=tiny.grid)
    close(tiny(), expected)
    sparse.disable(tiny.model)
    assert len(set(tiny.model.attn_processors.values())) == 1


def test_models_are_not_kept_alive():
    tiny = make("wan")
    sparse.enable(tiny.model, "dense")
    tiny()
    model = weakref.ref(tiny.model)
    del tiny
    gc.collect()
    assert model() is None


def test_backend_by_name(tiny):
    """diffusers' own switch turns an enabled model off and on."""
    from diffusers.models.attention_dispatch import attention_backend

    expected = tiny()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, dense_layers=[0])
    windowed = tiny()
    differs(windowed, expected)
    with attention_backend("native"):  # set_attention_backend sets the default, too
        tiny.model.set_attention_backend("native")
        close(tiny(), expected)
        tiny.model.set_attention_backend("sparse_fmha")
        close(tiny(), windowed)
