"""What `enable` sets belongs to one model: `disable` leaves nothing, and neither do errors."""

import copy
import itertools
import pickle
import types

import pytest

pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusion_state import NAME, image, same, windowed
from tiny_diffusion import MAKERS, make

from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_state import CURRENT

pytestmark = pytest.mark.usefixtures("default")
MODELS = list(MAKERS)


@pytest.fixture(params=MODELS)
def tiny(request):
    return make(request.param)


def active():
    return _AttentionBackendRegistry.get_active_backend()[0]


def test_disable_leaves_nothing(tiny):
    expected, before = tiny(), image(tiny.model)
    keys = list(tiny.model.state_dict())
    windowed(tiny, first_dense_steps=1, dense_layers=[0])
    assert list(tiny.model.state_dict()) == keys
    tiny(700), tiny(400)
    sparse.disable(tiny.model)
    same(image(tiny.model), before)
    assert tiny().equal(expected)


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
            with pytest.raises(
                RuntimeError,
                match=r"CogVideoXTransformer3DModel must be enabled before disable\(\); call",
            ):
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
    kind, calls = type(one.model.blocks[0].attn1), []
    own = kind.set_processor

    def failing(self, processor):
        calls.append(self)
        if len(calls) == fails_at + 1 + 4 * nested:  # the first ones take the previous ones off
            raise KeyboardInterrupt
        own(self, processor)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "set_processor", failing)
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
    assert CURRENT.call is None  # torch runs no hooks after KeyboardInterrupt
    with attention_backend(NAME):
        assert other().equal(dense)
        assert tiny().equal(expected)
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
