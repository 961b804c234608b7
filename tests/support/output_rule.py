"""How outputs are judged: by the error of attention with roundings that no kernel avoids."""

import bias_oracle
import torch
from gradient_oracle import mask_of


def rounded(case, arguments):
    """fp32 attention that rounds the weights, then the result."""
    tokens = {n: arguments[n].flatten(1, -3) for n in "qkv"}
    bias = arguments.get("key_bias")
    if bias is None:
        bias = torch.zeros(1, 1, tokens["k"].shape[1], device=tokens["k"].device)
    mask = bias_oracle.visible_with(
        mask_of(case.mechanism, arguments), bias, arguments.get("row_threshold")
    )
    if case.extra:
        tokens |= {n: torch.cat([tokens[n], arguments[f"extra_{n}"]], 1) for n in "kv"}
        mask = torch.nn.functional.pad(mask, (0, case.extra), value=True)
        bias = torch.nn.functional.pad(bias, (0, case.extra))
    out = bias_oracle.fused(*tokens.values(), mask, arguments["scale"], bias)
    return out.reshape(*arguments["q"].shape[:-1], -1)


def assert_as_good_as_rounded(case, arguments, out, exact):
    """The error of out against fp64 is at most twice that of `rounded`, plus rounding."""
    __tracebackhide__ = True
    assert out.isfinite().all()
    size = exact.abs().amax().clamp(min=1e-30)
    ours = (out.double() - exact).abs() / size
    theirs = (rounded(case, arguments).double() - exact).abs() / size
    for figure in (torch.max, lambda x: x.square().mean().sqrt()):
        error, allowed = figure(ours).item(), figure(theirs).item()
        assert error <= 2 * allowed + torch.finfo(out.dtype).eps, (error, allowed)


def assert_as_good_as(found, exact, theirs, dtype, what):
    """The error of a result against fp64 is at most twice that of another way to compute it in the
    same dtype, plus two roundings."""
    __tracebackhide__ = True
    assert found.shape == exact.shape, what
    assert found.isfinite().all(), f"{what}: {(~found.isfinite()).sum()} are not finite"
    for name, figure in {"largest": torch.max, "rms": lambda x: x.square().mean().sqrt()}.items():
        error, allowed = (figure((x.double() - exact).abs()).item() for x in (found, theirs))
        allowed = 2 * allowed + 2 * torch.finfo(dtype).eps * figure(exact.abs()).item()
        assert error <= allowed, (
            f"{name} error of {what} is {error:.3g}, {allowed:.3g} is allowed; worst at "
            f"{tuple(map(int, torch.unravel_index((found - exact).abs().argmax(), found.shape)))}"
        )
