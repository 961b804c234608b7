"""The functions of NATTEN's names, and the folder by which other programs load them."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import sparse_fmha
from sparse_fmha import reference
from sparse_fmha.integrations import natten

DECODER = "diffusers.models.autoencoders.ltx2_diffusion_decoder"
GRIDS = {natten.na1d: (20,), natten.na2d: (9, 7), natten.na3d: (4, 5, 6)}


def inputs(grid, heads=2, extra=3, **options):
    torch.manual_seed(0)
    q = torch.randn(2, *grid, 4, 16, **options)
    k, v = (torch.randn(2, *grid, heads, 16, **options) for _ in range(2))
    return q, k, v, *(torch.randn(2, extra, heads, 16, **options) for _ in range(2))


def exact(q, k, v, extra_k, extra_v, window, stride, dilation, causal, scale):
    grid = q.shape[1:-2]
    visible = reference.neighborhood_mask(
        grid, window, stride, dilation, causal, extra=extra_k.shape[1]
    )
    k, v = (torch.cat([x.flatten(1, -3), y], 1) for x, y in ((k, extra_k), (v, extra_v)))
    out, lse = reference.attention(q.flatten(1, -3), k, v, visible, scale)
    return out.view(q.shape), lse.view(q.shape[:-1])


@pytest.mark.parametrize("function", GRIDS, ids=lambda f: f.__name__)
def test_it_is_the_definition(function):
    grid = GRIDS[function]
    axes = len(grid)
    q, k, v, extra_k, extra_v = inputs(grid)
    causal = (True, *[False] * (axes - 1))
    out, lse = function(
        query=q,
        key=k,
        value=v,
        kernel_size=(3, 2, 3)[:axes],
        stride=(2, 1, 3)[:axes],
        dilation=(1, 2, 2)[:axes],
        is_causal=causal,
        scale=0.3,
        additional_keys=extra_k,
        additional_values=extra_v,
        return_lse=True,
    )
    options = (3, 2, 3)[:axes], (2, 1, 3)[:axes], (1, 2, 2)[:axes], causal, 0.3
    expected, expected_lse = exact(q, k, v, extra_k, extra_v, *options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-5)


def test_one_value_for_all_axes_by_position():
    q, k, v, extra_k, extra_v = inputs((9, 7))
    expected = sparse_fmha.neighborhood_attention(q, k, v, 3, stride=2, dilation=2, causal=True)
    assert natten.na2d(q, k, v, 3, 2, 2, True).equal(expected)
    both = natten.na2d(q, k, v, 3, 1, 1, False, 0.5, extra_k, extra_v)
    options = {"scale": 0.5, "extra_k": extra_k, "extra_v": extra_v}
    assert both.equal(sparse_fmha.neighborhood_attention(q, k, v, 3, **options))


def test_defaults_of_natten():
    """A scale of 0.0 is the default there, and no causal flag is False."""
    q, k, v, *_ = inputs((20,))
    expected = natten.na1d(q, k, v, 5)
    assert natten.na1d(q, k, v, 5, is_causal=None, scale=0.0, **natten.TUNING).equal(expected)


@pytest.mark.parametrize(
    "given",
    [
        {"backend": "cutlass-fna"},
        {"q_tile_shape": (8, 8)},
        {"backward_kv_splits": (1, 1)},
        {"run_persistent_kernel": False},
        {"kernel_schedule": "coop"},
        {"torch_compile": True},
        {"attention_kwargs": {"backend": "flex-fmha"}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_tunes_other_kernels_is_refused(given):
    q, k, v, *_ = inputs((9, 7))
    with pytest.raises(ValueError, match=f"^{next(iter(given))} must be .* got "):
        natten.na2d(q, k, v, 3, **given)


def test_other_arguments_and_ranks_are_refused():
    q, k, v, *_ = inputs((9, 7))
    with pytest.raises(TypeError, match=r"options of na2d must be among .* got 'rel_pos_bias'"):
        natten.na2d(q, k, v, 3, rel_pos_bias=None)
    with pytest.raises(ValueError, match="query must have 6 dimensions for na3d"):
        natten.na3d(q, k, v, 3)


def test_gradients_through_a_merge():
    """A neighborhood and other keys apart, merged, are both in one softmax."""
    q, k, v, extra_k, extra_v = (
        x.requires_grad_() for x in inputs((9, 7), heads=4, dtype=torch.float64)
    )
    near = natten.na2d(q, k, v, 3, return_lse=True)
    far = sparse_fmha.attention(q.flatten(1, 2), extra_k, extra_v, return_lse=True)
    far = far[0].view(q.shape), far[1].view(q.shape[:-1])
    merged, _ = natten.merge_attentions(*zip(near, far, strict=True), torch_compile=False)
    joined = natten.na2d(q, k, v, 3, additional_keys=extra_k, additional_values=extra_v)
    torch.testing.assert_close(merged, joined)
    weight = torch.randn_like(joined)
    leaves = q, k, v, extra_k, extra_v
    expected = torch.autograd.grad((joined * weight).sum(), leaves)
    gradients = torch.autograd.grad((merged * weight).sum(), leaves)
    for got, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


@pytest.fixture
def local_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", natten.write_local_kernel(tmp_path / "kernel"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_folder(tmp_path):
    value = natten.write_local_kernel(str(tmp_path / "a" / "b"))
    assert value == f"shi-labs/natten={tmp_path / 'a' / 'b'}"
    assert natten.write_local_kernel(tmp_path / "a" / "b") == value  # again
    names = set()
    for backend in ("cpu", "cuda"):
        variant = tmp_path / "a" / "b" / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        names.add(metadata["id"])
        module = load(variant / "__init__.py", metadata["id"])
        assert module.na3d is natten.na3d
    assert len(names) == 2
    with pytest.raises(
        ValueError, match="directory must be a path without a colon, for LOCAL_KERNELS, got"
    ):
        natten.write_local_kernel(tmp_path / "a:b")


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_kernel(name, version):
    """What the package `kernels` does with LOCAL_KERNELS, as far as it matters."""
    repository, path = os.environ["LOCAL_KERNELS"].split("=")
    assert (repository, version) == (name, 1)
    return load(Path(path) / "build" / "torch-cpu" / "__init__.py", "loaded")


def decoder_on_natten(expected):
    """diffusers' own processor, unchanged, computes what its other processor does."""
    module = pytest.importorskip(DECODER)
    from tiny_decoder import decode, decoder

    model = decoder()
    model.set_attn_processor(module.LTX2VideoVaeNeighborhoodNattenProcessor())
    with torch.no_grad():
        out = decode(model)
        torch.testing.assert_close(out, decode(decoder()), rtol=1e-4, atol=1e-4)
    assert model.decoder.diff_blocks[0].attn.processor._na3d is expected


flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@flex
@pytest.mark.usefixtures("local_kernels")
def test_diffusers_takes_it_through_the_folder(monkeypatch):
    module = pytest.importorskip(DECODER)
    monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    decoder_on_natten(natten.na3d)


@flex
@pytest.mark.usefixtures("local_kernels")
def test_the_package_kernels_loads_the_folder():
    pytest.importorskip("kernels")
    decoder_on_natten(natten.na3d)
