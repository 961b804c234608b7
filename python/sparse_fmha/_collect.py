"""Measures the attention calls of a running model for `calibration.Calibration`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Measure = Callable[..., None]  # (q, k, causal=, scale=), heads last


class Collector(TorchFunctionMode):
    """While it is entered, each attention call is measured and then goes on as it would.

    Seen are torch's `scaled_dot_product_attention` and `sparse_fmha.attention`, wherever the model
    makes them. A call that cannot be measured is counted in `passed_over`, by its reason.
    """

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self.measured = 0
        self.passed_over: Counter[str] = Counter()
        self._measure = measure
        ops = torch.ops.sparse_fmha
        self._of = {
            torch.nn.functional.scaled_dot_product_attention: self._sdpa,
            ops.fmha_fwd: self._ours,
            ops.fmha_skip_fwd: self._ours_that_skips,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._of:
            self._of[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Heads are second, as torch has them; a mask is causal from the first query on."""
        reason = None
        if attn_mask is not None:
            reason = "a mask tensor"
        elif is_causal and query.shape[-2] != key.shape[-2]:
            reason = "causal, with queries and keys of different lengths"
        elif query.dim() != 4 or query.shape[0] != key.shape[0]:
            reason = "not [batch, heads, tokens, head dim]"
        if reason is not None:
            self.passed_over[reason] += 1
            return
        q, k = (x.detach().transpose(1, 2) for x in (query, key))
        self._take(q, k, is_causal, scale)

    def _ours(self, q: Tensor, k: Tensor, v: Tensor, causal=False, scale=None) -> None:
        self._take(q.detach(), k.detach(), causal, scale)

    def _ours_that_skips(self, q, k, v, threshold, causal=False, scale=None) -> None:
        self._ours(q, k, v, causal, scale)

    def _take(self, q: Tensor, k: Tensor, causal: bool, scale: float | None) -> None:
        self.measured += 1
        with torch._C.DisableTorchFunction():
            self._measure(q, k, causal=causal, scale=scale)
