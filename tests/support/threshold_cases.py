"""Problems with lists whose rows have thresholds for the biases of keys."""

from dataclasses import replace

import bias_oracle
import torch
from gradient_cases import CASES
from gradient_oracle import attend, mask_of
from gradient_rule import assert_as_good_as_torch, output_gradients
from output_rule import assert_as_good_as_rounded
from poison import poisoned

LISTS = [name for name, case in CASES.items() if case.mechanism in ("block_sparse", "stripe")]
INF = float("inf")
FORMS = {"batch, heads": (2, None), "one batch entry": (1, None), "one for all": (1, 1)}


def limited(case, form="batch, heads", dtype=torch.float64, seed=0, **sizes):
    """Biases and thresholds that are drawn from few numbers, so that many are equal."""
    case = replace(case, batch=2)
    arguments = case.arguments(dtype, seed=seed, **sizes)
    batch, heads = FORMS[form]
    rng = torch.Generator().manual_seed(seed)

    def few(tokens, low):
        shape = batch, heads or case.heads, tokens
        drawn = torch.randint(low, 4, shape, generator=rng).float() / 2
        return drawn.to(arguments["q"].device)

    arguments["key_bias"] = few(arguments["k"].shape[1], -3)
    arguments["row_threshold"] = few(arguments["q"].shape[1], -4)
    return case, arguments


def check(case, arguments):
    """Results and gradients, whose errors are at most twice those of torch."""
    __tracebackhide__ = True
    with poisoned():
        out, lse = case.forward(arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    seen = bias_oracle.visible_with(
        mask_of(case.mechanism, arguments), arguments["key_bias"], arguments["row_threshold"]
    )
    rows = seen.any(-1).expand(case.batch, case.heads, -1).transpose(1, 2)
    assert (lse == -INF).equal(~rows)
    assert out[~rows].eq(0).all()
    torch.testing.assert_close(lse.masked_fill(~rows, 0).double(), exact_lse, rtol=2e-6, atol=1e-3)
    assert_as_good_as_rounded(case, arguments, out, exact)
    dout, _ = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout)
    assert_as_good_as_torch(case, arguments, found, dout, lse)
    groups = case.heads // arguments["k"].shape[2]
    nobody = ~seen.any(-2).expand(case.batch, case.heads, -1).unflatten(1, (-1, groups)).any(2)
    for n in "kv":
        assert found[n].transpose(1, 2)[nobody].eq(0).all()
    return out, lse, found
