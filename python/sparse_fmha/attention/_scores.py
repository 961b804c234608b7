"""What changes the scores: their cap, the bias of keys, thresholds of rows, and sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _checks

# The last arguments of the ops, as many as are given.
Biases = tuple[Tensor | float | None, ...]


def given(softcap: float, *tensors: Tensor | None) -> Biases:
    """The tensors in the order of the ops' arguments, and the cap behind them."""
    if type(softcap) is not float:
        softcap = checked_softcap(softcap)
    if softcap != 0:
        return (*tensors, softcap)
    while tensors and tensors[-1] is None:
        tensors = tensors[:-1]
    return tensors


def checked_softcap(softcap: float) -> float:
    """The cap as a float, finite and at least 0."""
    if softcap is None:
        raise TypeError("softcap must be a finite number, got None")
    cap = _checks.finite("softcap", softcap)
    if cap < 0:
        raise ValueError(f"softcap must be at least 0, got {softcap}")
    return cap


def check(
    q: Tensor,
    k: Tensor,
    softcap: float,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
) -> None:
    """Checks the arguments against q and k, which are checked already."""
    checked_softcap(softcap)
    if key_bias is not None:
        _checks.check_token_numbers("key_bias", key_bias, q, k.shape[1:-2], allow_grid=True)
    if row_threshold is not None:
        if key_bias is None:
            raise ValueError("key_bias must be given with row_threshold, got only the latter")
        _checks.check_token_numbers("row_threshold", row_threshold, q, q.shape[1:-2])


def flat(biases: Biases, q: Tensor) -> Biases:
    """The biases as the ops take them, with q's grid flattened; ops refuse any other shape."""

    def one(bias: Tensor | float | None) -> Tensor | float | None:
        if not isinstance(bias, Tensor) or bias.dim() <= 3 or bias.shape[2:] != q.shape[1:-2]:
            return bias
        return bias.flatten(2)

    return tuple(map(one, biases))


def check_sink(sink: Tensor, q: Tensor) -> None:
    """Checks a sink, fp32 `[Hq]`; fp64 is allowed if q is fp64."""
    _checks.check_strided("sink", sink)
    wide = torch.promote_types(q.dtype, torch.float32)
    if sink.dtype not in (torch.float32, wide):
        allowed = " or ".join(map(str, dict.fromkeys((torch.float32, wide))))
        raise TypeError(f"sink must have dtype {allowed}, got {sink.dtype}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on q's device, {q.device}, got {sink.device}")
    if tuple(sink.shape) != (q.shape[-2],):
        raise ValueError(
            f"sink must have shape [{q.shape[-2]}], one entry for each query head, got "
            f"{list(sink.shape)}"
        )


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Adds one more logit without a value to each row's softmax.

        out' = out * sigmoid(lse - sink), lse' = log(exp(lse) + exp(sink))

    In fp32, or fp64 for fp64 outputs.

    Args:
        out: `[B, *L, H, D]`. lse: `[B, *L, H]`, -inf where a query sees no key.
        sink: `[H]`; -inf changes nothing.

    Returns:
        Both in their dtypes. A row without keys has out 0 and lse' = sink.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    total, sink = lse.to(wide), sink.to(wide)
    empty, absent = total == -torch.inf, sink == -torch.inf
    # Finite in both, so that derivatives are finite.
    total, finite = total.masked_fill(empty, 0), sink.masked_fill(absent, 0)
    share = (total - finite).sigmoid().masked_fill(absent, 1)
    both = torch.logaddexp(total, finite)
    both = torch.where(empty, finite, torch.where(absent, total, both))
    both = both.masked_fill(empty & absent, -torch.inf)
    return (out * share[..., None]).to(out.dtype), both.to(lse.dtype)
