"""Problems with lists whose rows have thresholds for the biases of keys."""

from dataclasses import replace

import torch
from gradient_cases import CASES

LISTS = [name for name, case in CASES.items() if case.mechanism in ("block_sparse", "stripe")]
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
