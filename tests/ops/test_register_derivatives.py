"""An op with a backward pass, registered as those of the library are."""

import pytest
import torch
from derivative_ways import FORWARD, REVERSE

from sparse_fmha._ops import derivatives, vmap


def waves(x, y, scale=2.0):
    return scale * x.sin() * y, (x * y).sum(-1)


def waves_bwd(x, y, scale, dout, dsum):
    dx = dout * scale * x.cos() * y + dsum[..., None] * y
    return dx, dout * scale * x.sin() + dsum[..., None] * x


def setup_context(ctx, inputs, output):
    x, y, ctx.scale = inputs
    ctx.save_for_backward(x, y)


def backward(ctx, dout, dsum):
    assert ctx.needs_input_grad[0]
    return *OPS.waves_bwd(*ctx.saved_tensors, ctx.scale, dout, dsum), None


@pytest.fixture(scope="module", autouse=True)
def library():
    library = torch.library.Library("sparse_fmha_test", "DEF")
    library.define("waves(Tensor x, Tensor y, float scale=2.0) -> (Tensor, Tensor)")
    library.define(
        "waves_bwd(Tensor x, Tensor y, float scale, Tensor dout, Tensor dsum) -> (Tensor, Tensor)"
    )
    for function in (waves, waves_bwd):
        library.impl(function.__name__, function, "CompositeExplicitAutograd")
        vmap.register(library, getattr(OPS, function.__name__).default)
    derivatives.register(library, OPS.waves.default, backward, setup_context)
    derivatives.register(library, OPS.waves_bwd.default)
    yield library
    library._destroy()


OPS = torch.ops.sparse_fmha_test
SECOND = [way for way in REVERSE if "grad of grad" in way or "twice" in way or "hessian" in way]
Y = torch.tensor([[0.5, -1.0, 2.0]])


@pytest.fixture
def x():
    return torch.tensor([[0.3, -0.7, 1.1]])


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("way", [way for way in REVERSE if way not in SECOND])
def test_first_derivatives_are_right(x, way, output):
    for requires_grad in (False, True):
        x = x.detach().requires_grad_(requires_grad)
        found = REVERSE[way](lambda x: OPS.waves(x, Y)[output], x)
        torch.testing.assert_close(found, REVERSE[way](lambda x: waves(x, Y)[output], x))


@pytest.mark.parametrize("way", ["vjp", "grad", "jacrev", "vmap of grad", "backward"])
def test_compiled(x, way):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: REVERSE[way](lambda x: OPS.waves(x, Y, 3.0)[0], x), backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), REVERSE[way](lambda x: waves(x, Y, 3.0)[0], x))


@pytest.mark.parametrize("way", SECOND)
def test_a_second_derivative_names_the_backward_op(x, way):
    with pytest.raises(NotImplementedError, match="waves_bwd has no backward pass"):
        REVERSE[way](lambda x: OPS.waves(x, Y)[0], x)


@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode_names_the_op(x, way):
    with pytest.raises(NotImplementedError, match=r"waves(_bwd)? has no forward-mode derivative"):
        FORWARD[way](lambda x: OPS.waves(x, Y)[0], x)


def test_gradients_of_both_arguments(x):
    tensors = [x.double().requires_grad_(), Y.double().requires_grad_()]
    torch.autograd.gradcheck(OPS.waves, tensors)
    torch.autograd.gradcheck(lambda x, y: OPS.waves(x, y, scale=0.5), tensors)
