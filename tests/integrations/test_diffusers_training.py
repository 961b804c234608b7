"""Training of tiny models of diffusers: as with torch's attention where the window is all."""

import pytest

pytest.importorskip("diffusers")

from low_rank import adapt, assert_trains_alike, train
from tiny_diffusion import MAKERS, make, torch_attention_with

from sparse_fmha.integrations import diffusers as sparse

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def loss_of(tiny):
    target = tiny() + 0.5

    def loss():
        out = tiny.model(**tiny.inputs, return_dict=False)[0]
        return (out - target).square().mean()

    return loss


@pytest.mark.parametrize("method", ["neighborhood", "dense"])
@pytest.mark.parametrize("name", MAKERS)
def test_low_rank_adapters(name, method):
    tiny = make(name)
    parameters = adapt(tiny.model, PROJECTIONS)
    assert parameters
    loss = loss_of(tiny)
    expected = train(parameters, loss)
    sparse.enable(tiny.model, method, **({"window": tiny.grid} if method != "dense" else {}))
    assert_trains_alike(train(parameters, loss), expected)


def test_a_window_is_masked_torch_attention():
    tiny = make("wan")
    parameters = adapt(tiny.model, PROJECTIONS)
    loss = loss_of(tiny)
    with torch_attention_with(tiny.visible(**tiny.options)):
        expected = train(parameters, loss)
    sparse.enable(tiny.model, "neighborhood", **tiny.options)
    assert_trains_alike(train(parameters, loss), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_gradient_checkpointing(name):
    """Blocks that the backward pass runs again are as they were, to the bit."""
    tiny = make(name)
    parameters = adapt(tiny.model, PROJECTIONS)
    loss = loss_of(tiny)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    plain = train(parameters, loss, steps=1)[1]
    tiny.model.enable_gradient_checkpointing()
    function = tiny.model._gradient_checkpointing_func
    calls = []

    def counted(block, *args):
        calls.append(block)
        return function(block, *args)

    tiny.model._gradient_checkpointing_func = counted
    for x in parameters:
        x.grad = None
    loss()
    total = loss()
    loss()  # other calls before the backward pass of this one
    total.backward()
    assert calls
    assert tiny.model._gradient_checkpointing_func is counted
    for x, expected in zip(parameters, plain, strict=True):
        assert x.grad.equal(expected)
