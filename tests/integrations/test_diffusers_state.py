"""What `enable` sets belongs to one model: copies have their own, `disable` leaves nothing."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from tiny_diffusion import MAKERS, make

import sparse_fmha
from sparse_fmha.integrations import _diffusion_methods
from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_backend import CALL

MODELS = list(MAKERS)
NAME = "sparse_fmha"


@pytest.fixture(params=MODELS)
def tiny(request):
    return make(request.param)


@pytest.fixture(autouse=True)
def default():
    """The default backend of the process is what it was."""
    with attention_backend(_AttentionBackendRegistry.get_active_backend()[0]):
        yield


def active():
    return _AttentionBackendRegistry.get_active_backend()[0]


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


def image(model):
    """All that an object of the model holds, by identity."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            plain = isinstance(value, dict)
            state[name, key] = (dict(value), list(value)) if plain else value
        processor = getattr(module, "processor", None)
        if processor is not None:
            state[name, "processor's"] = dict(vars(processor))
    return state


def same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] is value or found[key] == value, key
    for key, value in expected.items():  # not equal only: the very objects
        if key[1] == "processor":
            assert found[key] is value


def windowed(tiny, **options):
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, **options)


def test_disable_leaves_nothing(tiny):
    expected, before = tiny(), image(tiny.model)
    keys = list(tiny.model.state_dict())
    windowed(tiny, first_dense_steps=1, dense_layers=[0])
    assert list(tiny.model.state_dict()) == keys
    tiny(700), tiny(400)
    sparse.disable(tiny.model)
    same(image(tiny.model), before)
    assert tiny().equal(expected)


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


def test_other_models_while_the_backend_is_the_default(tiny):
    """`set_attention_backend` of one model makes it the default of the process."""
    other = make("wan" if tiny.name != "WanTransformer3DModel" else "ltx")
    own, others, before = tiny(), other(), active()
    state = image(tiny.model)
    windowed(tiny)
    expected = tiny()
    tiny.model.set_attention_backend(NAME)
    _AttentionBackendRegistry._active_backend = AttentionBackendName(NAME)  # older ones do not
    assert other().equal(others)
    assert tiny().equal(expected)
    sparse.disable(tiny.model)
    assert active() == before
    assert tiny().equal(own)
    assert other().equal(others)
    same(image(tiny.model), state)


@pytest.mark.parametrize("how", ["model", "default"])
def test_the_backend_without_enable_is_torch(tiny, how):
    with attention_backend("native"):
        expected = tiny()
    if how == "model":
        tiny.model.set_attention_backend(NAME)
        assert tiny().equal(expected)
        tiny.model = pickle.loads(pickle.dumps(tiny.model))
        assert tiny().equal(expected)
    else:
        with attention_backend(NAME):
            assert tiny().equal(expected)


def test_dense_steps_keep_the_backend_that_was_chosen():
    """Not torch's choice, where another backend was the default before."""
    tiny = make("flux")
    with attention_backend("_native_math"):
        expected = tiny(), tiny(400)
        windowed(tiny, first_dense_steps=1)
        assert tiny().equal(expected[0])
        assert not tiny(400).equal(expected[1])
        sparse.disable(tiny.model)
        assert active() == "_native_math"


@pytest.mark.parametrize("order", list(itertools.product("+-", repeat=4)), ids="".join)
def test_enable_and_disable_nest(order):
    """As a stack: each `disable` takes back the last `enable`."""
    tiny = make("cogvideox")
    before = image(tiny.model)
    windows = [(2, 2, 2), (3, 3, 3), (2, 3, 4), (4, 2, 3)]
    stack = [tiny()]
    for sign, window in zip(order, windows, strict=True):
        if sign == "+":
            sparse.enable(tiny.model, "neighborhood", window=window)
            stack.append(tiny())
            assert all(not stack[-1].equal(out) for out in stack[:-1])
        elif len(stack) > 1:
            sparse.disable(tiny.model)
            stack.pop()
        else:
            with pytest.raises(RuntimeError, match="is not enabled"):
                sparse.disable(tiny.model)
        assert tiny().equal(stack[-1])
        assert sparse.is_enabled(tiny.model) == (len(stack) > 1)
    tiny.model = copy.deepcopy(tiny.model)
    while len(stack) > 1:
        assert tiny().equal(stack.pop())
        sparse.disable(tiny.model)
    assert tiny().equal(stack[0])
    if not sparse.is_enabled(tiny.model):
        assert list(image(tiny.model)) == list(before)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_an_error_in_enable_changes_nothing(monkeypatch, fails_at, nested):
    """Also KeyboardInterrupt, and in the second transformer of a pipeline."""
    one, two = make("wan"), make("wan")
    pipe = types.SimpleNamespace(transformer=one.model, transformer_2=two.model)
    if nested:
        sparse.enable(pipe, "neighborhood", window=one.window)
    before, expected = [image(t.model) for t in (one, two)], [one(), two()]
    register, calls = torch.nn.Module.register_forward_hook, []

    def failing(self, *args, **kwargs):
        if self in layers:
            calls.append(self)
            if len(calls) == fails_at + 1:
                raise KeyboardInterrupt
        return register(self, *args, **kwargs)

    layers = [b.attn1 for t in (one, two) for b in t.model.blocks]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "register_forward_hook", failing)
        with pytest.raises(KeyboardInterrupt):
            sparse.enable(pipe, "dense")
    assert sparse.is_enabled(pipe) == nested
    assert [one(), two()][0].equal(expected[0])
    assert two().equal(expected[1])
    if not nested:
        same(image(one.model), before[0])
        same(image(two.model), before[1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "layer", "feed-forward"])
def test_an_error_in_a_call_leaves_no_context(error, where):
    tiny, other = make("wan"), make("wan")
    dense = other()
    windowed(tiny)
    expected = tiny()
    module = {
        "model": tiny.model,
        "layer": tiny.model.blocks[1].attn1,
        "feed-forward": tiny.model.blocks[0].ffn,
    }[where]

    def fail(*_):
        raise error

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(error):
        tiny()
    handle.remove()
    if error is ValueError:  # torch runs no hooks after KeyboardInterrupt
        assert CALL.get() is None
    with attention_backend(NAME):
        assert tiny().equal(expected)
        assert CALL.get() is None
        assert other().equal(dense)


def test_disable_after_an_interrupted_call():
    tiny, other = make("wan"), make("wan")
    dense = other()
    windowed(tiny)

    def stop(*_):
        raise KeyboardInterrupt

    tiny.model.blocks[1].attn1.to_q.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    sparse.disable(tiny.model)
    with attention_backend(NAME):
        assert other().equal(dense)


def test_a_model_that_calls_another():
    outer, inner = make("wan"), make("ltx")
    dense = inner()
    windowed(outer)
    expected = outer()
    outer.model.blocks[0].ffn.register_forward_pre_hook(lambda *_: results.append(inner()))
    results = []
    with attention_backend(NAME):
        assert outer().equal(expected)
        windowed(inner)
        assert outer().equal(expected)
        within = inner()
    assert results[0].equal(dense)
    assert results[1].equal(within)
    assert not within.equal(dense)


def test_other_models_compile_to_one_graph():
    """Where the backend is the default, and another model is enabled."""
    tiny, other = make("wan"), make("ltx")
    expected = other()
    windowed(tiny)
    tiny()
    with attention_backend(NAME):
        other.model = torch.compile(other.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(other(), expected)
    torch.compiler.reset()


def test_an_enabled_model_counts_steps_when_compiled():
    tiny, times = make("wan"), (900, 900, 700, 400, 900, 700)
    windowed(tiny, first_dense_steps=2)
    expected = [tiny(t) for t in times]
    model = tiny.model
    sparse.disable(model)
    windowed(tiny, first_dense_steps=2)
    tiny.model = torch.compile(model, backend="eager")
    for t, out in zip(times, expected, strict=True):
        torch.testing.assert_close(tiny(t), out)
    torch.compiler.reset()


def test_pipelines_that_share_a_transformer():
    one, two = make("wan"), make("wan")
    dense = one()
    first = types.SimpleNamespace(transformer=one.model)
    second = types.SimpleNamespace(transformer=one.model, transformer_2=two.model)
    sparse.enable(first, "neighborhood", window=one.window)
    expected = one()
    assert sparse.is_enabled(first)
    assert not sparse.is_enabled(second)  # not as a whole
    sparse.disable(second)
    assert one().equal(dense)
    sparse.enable(second, "neighborhood", window=one.window)
    assert one().equal(expected)
    sparse.disable(first)
    assert one().equal(dense)
    sparse.disable(second)
    assert not sparse.is_enabled(two.model)
    with pytest.raises(RuntimeError, match="is not enabled"):
        sparse.disable(second)


def test_a_pipeline_with_one_transformer_twice():
    tiny = make("wan")
    dense = tiny()
    pipe = types.SimpleNamespace(transformer=tiny.model, transformer_2=tiny.model)
    sparse.enable(pipe, "neighborhood", window=tiny.window)
    sparse.disable(pipe)
    assert tiny().equal(dense)
    assert not sparse.is_enabled(pipe)


def test_offloading_hooks_of_accelerate():
    """They replace `forward`; ours are around it, whichever came first and leaves first."""
    hooks = pytest.importorskip("accelerate.hooks")
    for first, leaves in itertools.product(("ours", "theirs"), repeat=2):
        tiny = make("wan")
        dense, before = tiny(), image(tiny.model)

        def enter(kind, tiny=tiny):
            if kind == "ours":
                return windowed(tiny)
            for module in (tiny.model, *tiny.model.blocks, tiny.model.blocks[0].attn1):
                hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
            return None

        def leave(kind, tiny=tiny):
            if kind == "ours":
                return sparse.disable(tiny.model)
            return hooks.remove_hook_from_module(tiny.model, recurse=True)

        others = {"ours": "theirs", "theirs": "ours"}
        enter(first)
        enter(others[first])
        expected = tiny()
        assert not expected.equal(dense)
        copied = copy.deepcopy(tiny.model)
        leave(leaves)
        assert tiny().equal(dense if leaves == "ours" else expected)
        leave(others[leaves])
        assert tiny().equal(dense)
        del before  # accelerate leaves `forward` behind
        sparse.disable(copied)
        tiny.model = copied
        assert tiny().equal(dense)


def test_a_mask_follows_the_model(monkeypatch):
    """Its copy is made once for each device."""
    seen = []

    def watched(q, k, v, mask, **options):
        seen.append(mask)
        return q

    monkeypatch.setattr(_diffusion_methods, "block_sparse_attention", watched)
    blocks = torch.ones(1, 1, 2, 8, dtype=torch.bool)
    mask = sparse_fmha.BlockMask.from_blocks(blocks, 120, 120, 64, 16)
    method = _diffusion_methods.make("block_sparse", {"mask": mask})
    layout = _diffusion_methods.Layout((4, 5, 6))
    for device in ("cpu", "meta", "cpu", "meta"):
        q = torch.ones(1, 120, 2, 16, device=device)
        method(q, q, q, layout, [0], None)
        assert seen[-1].device == q.device
    assert seen[0] is seen[2] is mask
    assert seen[1] is seen[3]


def test_to_another_dtype_and_back():
    tiny = make("wan")
    windowed(tiny)
    expected = tiny()
    tiny.model.to(torch.float64).to(torch.float32)
    assert tiny().equal(expected)
    sparse.disable(tiny.model)
    assert not sparse.is_enabled(tiny.model)
