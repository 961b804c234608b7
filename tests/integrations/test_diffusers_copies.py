"""Copies of an enabled model, in memory and in files, have a state of their own."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import attention_backend
from diffusion_state import NAME, windowed
from tiny_diffusion import MAKERS, make

from sparse_fmha.integrations import diffusers as sparse

pytestmark = pytest.mark.usefixtures("default")


@pytest.fixture(params=MAKERS)
def tiny(request):
    return make(request.param)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "twice": lambda model: saved(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_enabled_by_itself(tiny, way):
    dense = tiny()
    windowed(tiny, dense_layers=[0])
    expected = tiny()
    assert not expected.equal(dense)
    original, other = tiny.model, COPIES[way](tiny.model)
    first, second = (original, other) if way == "deepcopy" else (other, original)
    for disabled, kept in ((first, second), (second, None)):
        sparse.disable(disabled)
        assert not sparse.is_enabled(disabled)
        tiny.model = disabled
        assert tiny().equal(dense)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in disabled.modules())
        if kept is not None:
            assert sparse.is_enabled(kept)
            tiny.model = kept
            assert tiny().equal(expected)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_counts_its_own_steps(way):
    tiny = make("wan")
    dense = {t: tiny(t) for t in (900, 700)}
    windowed(tiny, first_dense_steps=1)
    tiny(900)
    original, tiny.model = tiny.model, COPIES[way](tiny.model)
    assert tiny(700).equal(dense[700])  # its first step
    tiny.model = original
    assert not tiny(700).equal(dense[700])


def test_hooks_after_loading_do_not_take_the_place_of_ours(tmp_path):
    """A process that has no hooks yet numbers its own from 0."""
    tiny = make("wan")
    windowed(tiny)
    tiny.model.set_attention_backend(NAME)
    expected = tiny()
    torch.save((tiny.model, tiny.inputs, expected), tmp_path / "model")
    code = f"""
import torch
model, inputs, expected = torch.load({str(tmp_path / "model")!r}, weights_only=False)
for module in list(model.modules()):
    module.register_forward_pre_hook(lambda *_: None)
    module.register_forward_hook(lambda *_: None)
with torch.no_grad():
    assert model(**inputs, return_dict=False)[0].equal(expected)
from sparse_fmha.integrations import diffusers as sparse
sparse.disable(model)
assert not sparse.is_enabled(model)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_with_the_backend_by_name_is_loaded_in_another_process(tmp_path):
    tiny = make("wan")
    with attention_backend("native"):
        tiny.model.set_attention_backend(NAME)
        torch.save((tiny.model, tiny.inputs, tiny()), tmp_path / "model")
    code = f"""
import torch
model, inputs, expected = torch.load({str(tmp_path / "model")!r}, weights_only=False)
with torch.no_grad():
    assert model(**inputs, return_dict=False)[0].equal(expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
