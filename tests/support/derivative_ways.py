"""The ways in which torch can be asked for a derivative."""

import torch
from torch import func
from torch.autograd import forward_ad

from sparse_fmha import _ops


def by_dual_numbers(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def by_backward(f, x, twice=False):
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=twice)
    return torch.autograd.grad(grad.sum(), x)[0] if twice else grad


def forward_jacobian(f, x):
    options = {"strategy": "forward-mode", "vectorize": True}
    return torch.autograd.functional.jacobian(f, x, **options)


# Each returns a derivative of f, which maps a tensor to a tensor, at x.
FORWARD = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "jvp of vmap": lambda f, x: func.jvp(func.vmap(f), (x[None],), (x[None].cos(),))[1],
    "jvp under no_grad": lambda f, x: torch.no_grad()(lambda: FORWARD["jvp"](f, x))(),
    "hessian": lambda f, x: func.hessian(lambda x: f(x).sum())(x),
    "forward_ad": by_dual_numbers,
    "linearize": lambda f, x: func.linearize(f, x)[1](x.cos()),
    "functional.jacobian, forward": forward_jacobian,
}
REVERSE = {
    "vjp": lambda f, x: func.vjp(f, x)[1](f(x).detach().cos())[0],
    "grad": lambda f, x: func.grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda x: f(x).sum()))(x[None]),
    "grad of grad": lambda f, x: func.grad(lambda x: func.grad(lambda x: f(x).sum())(x).sum())(x),
    "grad of vmap": lambda f, x: func.grad(lambda x: func.vmap(f)(x).sum())(x[None]),
    "backward": by_backward,
    "backward twice": lambda f, x: by_backward(f, x, twice=True),
    "functional.hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x),
}
WAYS = FORWARD | REVERSE
# What torch.compile does not take in one graph; it runs them in parts.
BROKEN_GRAPHS = {"linearize", "jvp under no_grad", "backward", "backward twice"}
BROKEN_GRAPHS |= {way for way in WAYS if "functional" in way}


SECOND = {"grad of grad", "backward twice", "functional.hessian"}
FIRST = [way for way in REVERSE if way not in SECOND]
# Where no tiles are left out, and where they are, by all but the threshold.
WITH_BACKWARD = [f"{name}_fwd" for name in (*_ops.MECHANISMS, "varlen")]
WITH_BACKWARD_THAT_SKIPS = [f"{name}_fwd that skips" for name in _ops.MECHANISMS]


def lacking(way, call, argument="q"):
    """What the error says of an op that has no such derivative; None where it has.

    call: the name of the op, with more words behind it where it skips.
    """
    op = call.partition(" ")[0]
    if way in FORWARD:
        return f"sparse_fmha::{op} has no forward-mode derivative"
    if call in WITH_BACKWARD_THAT_SKIPS and argument == "skip_threshold":
        return f"sparse_fmha::{op} has no backward pass for skip_threshold"
    if call not in WITH_BACKWARD + WITH_BACKWARD_THAT_SKIPS:
        return f"sparse_fmha::{op} has no backward pass yet"
    if way in SECOND:
        return f"sparse_fmha::{op.replace('_fwd', '_bwd')} has no backward pass yet"
    return None
