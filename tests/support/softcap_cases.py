"""Problems whose scores have a cap, and how their results on a GPU are judged."""

import torch
from gradient_oracle import attend
from gradient_rule import assert_as_good_as_torch, eager, output_gradients
from poison import poisoned

# Scores of the cases are some units large: most are capped hard, some, and hardly any.
CAPS = (0.7, 5.0, 50.0)
TANH_ERROR = 2**-11  # of tanh.approx.f32, relative
# What no function takes, the type of the error, and its message.
BAD = {
    "negative": (-1.0, ValueError, r"softcap must be at least 0, got -1\.0"),
    "a negative int": (-2, ValueError, "softcap must be at least 0, got -2"),
    "nan": (float("nan"), ValueError, "softcap must be a finite number, got nan"),
    "infinite": (float("inf"), ValueError, "softcap must be a finite number, got inf"),
    "None": (None, TypeError, "softcap must be a finite number, got None"),
    "text": ("5", TypeError, "softcap must be a finite number or None, got '5'"),
    "bool": (True, TypeError, "softcap must be a finite number or None, got True"),
}


def check(case, arguments, **wanted):
    """out, whose error is at most twice that of torch's eager attention; lse, and the gradients."""
    __tracebackhide__ = True
    with poisoned():
        out, lse = case.forward(arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    most = min(arguments["softcap"], exact_lse.abs().max().item() + 10)
    torch.testing.assert_close(
        lse.masked_fill(lse == -torch.inf, 0).double(),
        exact_lse,
        rtol=2e-6,
        atol=1e-3 + TANH_ERROR * most,
    )
    assert out.isfinite().all()
    ours, theirs = ((x.double() - exact).abs() for x in (out, eager(case, arguments)))
    for figure in (torch.max, lambda x: x.square().mean().sqrt()):
        allowed = 2 * figure(theirs) + torch.finfo(out.dtype).eps * exact.abs().max()
        assert figure(ours) <= allowed, (figure(ours).item(), allowed.item())
    dout, _ = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout, **wanted)
    assert_as_good_as_torch(case, arguments, found, dout, lse)
    return found
