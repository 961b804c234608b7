"""Problems of every mechanism with a bias of keys."""

from dataclasses import replace

import torch
from gradient_cases import values
from gradient_oracle import GRADIENTS
from gradient_rule import output_gradients

INF = float("inf")
FORMS = ["batch, heads", "one batch entry", "one head", "one for all"]
BY_MECHANISM = {"fmha": "causal", "neighborhood": "2-D, causal on one axis"}
BY_MECHANISM |= {"block_sparse": "blocks 64x16", "stripe": "stripes, causal"}


def biased(case, form, dtype=torch.float64, hidden=0.2, seed=0, **sizes):
    """A case with two batch entries and its arguments, with a bias that hides some keys."""
    case = replace(case, batch=2)
    arguments = case.arguments(dtype, seed=seed, **sizes)
    tokens = arguments["k"].shape[1:-2].numel()
    batch = 1 if form in ("one batch entry", "one for all") else 2
    heads = 1 if form in ("one head", "one for all") else case.heads
    of_bias = {"dtype": torch.float32, "device": arguments["k"].device}
    bias = values(batch, heads, tokens, seed=90 + seed, **of_bias) * 2
    gone = values(batch, heads, tokens, seed=91 + seed, **of_bias)
    bias = bias.masked_fill(gone.abs() < 1.6 * hidden, -INF)
    return case, arguments | {"key_bias": bias}


def differentiated(case, arguments):
    """out, lse, their gradients, and the gradients of what has one."""
    own = {n: arguments[n].detach().requires_grad_() for n in GRADIENTS if n in arguments}
    out, lse = case.forward({**arguments, **own})
    by = output_gradients(out.detach(), lse.detach())
    found = torch.autograd.grad((out, lse), list(own.values()), by)
    return out.detach(), lse.detach(), by, dict(zip(own, found, strict=True))
