"""FlashAttention-3 as a peer: fa3-fwd, or flash-attn-3, which is built from its source."""

from __future__ import annotations

import importlib
import importlib.util

from benchmarks.cases.case import Case
from benchmarks.harness.names import NO_MASK, UnavailableError

# By module, the package and the dtypes that it takes; the first that serves a case is called.
INTERFACES = {
    "fa3_fwd_interface": ("fa3-fwd", ("bfloat16",)),
    "flash_attn_interface": ("flash-attn-3", ("bfloat16", "float16")),
}


def fa3(case: Case, q, k, v):
    op = forward(q, k, v, case.causal, case.dtype)
    if case.window or case.lists:
        raise UnavailableError(NO_MASK)
    return op


def forward(q, k, v, causal: bool, dtype: str = "bfloat16"):
    """The op of dense or causal attention; UnavailableError where it cannot run."""
    flash_attn_func = load(dtype)

    def op():
        result = flash_attn_func(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return op


def load(dtype: str = "bfloat16"):
    """The function of the first installed package that takes the dtype; else UnavailableError."""
    installed = [name for name in INTERFACES if importlib.util.find_spec(name) is not None]
    if not installed:
        raise UnavailableError("the package fa3-fwd is not installed")
    for name in installed:
        package, dtypes = INTERFACES[name]
        if dtype in dtypes:
            try:
                return importlib.import_module(name).flash_attn_func
            except (ImportError, OSError) as problem:
                raise UnavailableError(f"{package} does not load: {problem}") from problem
    package, dtypes = INTERFACES[installed[0]]
    raise UnavailableError(f"{package} takes {' and '.join(dtypes)} only")
