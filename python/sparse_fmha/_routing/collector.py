"""Measures the attention calls of a running model for `calibration.Calibration`."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._routing import torch_only
from sparse_fmha._routing.call_mode import CallMode, count_compiled
from sparse_fmha._routing.sdpa_call import Refusal, arrange, refusals

Measure = Callable[..., None]  # (q, k, causal=, scale=), heads last
Measured = tuple[Tensor, Tensor, bool, float | None]


class Collector(CallMode):
    """A mode that runs each attention call unchanged and measures it afterwards.

    It intercepts torch's `scaled_dot_product_attention` and `sparse_fmha.attention`, wherever the
    model calls them. A call that cannot be measured is counted in `passed_over` by reason; a call
    that raises is not counted.
    """

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self.measured = 0
        self._measure = measure

    @property
    def passed_over(self) -> Counter[str]:
        """The calls that could not be measured, by reason."""
        return self.left

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        of_call = _OF.get(func)
        if of_call is None:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            count_compiled("Collector")
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        try:
            with refusals(), torch.no_grad():
                torch_only.check_eager([*args, *kwargs.values()])
                torch_only.check_readable()
                q, k, causal, scale = of_call(*args, **kwargs)
        except Refusal as refusal:
            self.left[str(refusal)] += 1
            return result
        with torch._C.DisableTorchFunction():
            self._measure(q.detach(), k.detach(), causal=causal, scale=scale)
        self.measured += 1
        return result


def _of_torch(*args: Any, **kwargs: Any) -> Measured:
    """What to measure of torch's function. Only queries and keys matter, so dropout is ignored."""
    bound = inspect.signature(arrange).bind(*args, **kwargs)
    if bound.arguments.get("attn_mask") is not None:
        raise NotImplementedError("a mask tensor")
    bound.arguments["dropout_p"] = 0.0
    call = arrange(*bound.args, **bound.kwargs)
    if call.causal and call.q.shape[1] != call.k.shape[1]:
        # torch aligns causal to the first query, `tile_sparsity` to the last.
        raise NotImplementedError("causal, with queries and keys of different lengths")
    return call.q, call.k, call.causal, call.scale


def _of_ours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    skip_threshold: Tensor | None = None,
    key_bias: Tensor | None = None,
    softcap: float = 0.0,
    save_skipped: bool = False,
) -> Measured:
    if key_bias is not None:
        raise NotImplementedError("a bias of keys")
    if softcap:
        raise NotImplementedError("a soft cap of scores")
    return q, k, causal, _checks.check_attention(q, k, v, causal, scale)


_OF = {
    torch.nn.functional.scaled_dot_product_attention: _of_torch,
    torch.ops.sparse_fmha.fmha_fwd: _of_ours,
}
