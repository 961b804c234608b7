"""Layers that are to run in torch's attention, such as those of head dim 512 of Gemma 4.

Their masks are plans as of other layers, and become tensors of all pairs here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_fmha.integrations._sinks import with_sink
from sparse_fmha.integrations._transformers_decode import as_mask, is_of_one
from sparse_fmha.integrations._transformers_plan import Plan
from sparse_fmha.integrations._transformers_rows import by_distance, by_lists


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Plan | Tensor,
    dropout: float,
    scaling: float | None,
    sink: Tensor | None,
    softcap: float,
    **kwargs: Any,
) -> Tensor:
    """SDPA, or with a sink or a cap torch's own functions, which store the scores.

    Args:
        query: `[B, Hq, Lq, D]`. key, value: `[B, Hkv, Lkv, D]`.
        mask: a plan, a span, or a mask tensor.

    Returns:
        `[B, Lq, Hq, D]`.
    """
    if isinstance(mask, Plan):
        key, value = (x[:, :, : mask.keys] for x in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    plain = sink is None and not softcap
    causal = plain and isinstance(mask, Plan) and mask == Plan(causal=True, keys=mask.keys)
    causal = causal and queries == keys
    seen = None if causal else seen_pairs(mask, queries, keys, query.device)
    if not plain:
        return with_sink(query, key, value, seen, sink, scaling, softcap)
    out, _ = sdpa_attention_forward(
        module, query, key, value, seen, dropout, scaling, causal, **kwargs
    )
    result: Tensor = out
    return result


def seen_pairs(mask: Plan | Tensor, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Bool, broadcastable to `[B, Hq, Lq, Lkv]`, True where a key is seen; None if all are."""
    if isinstance(mask, Tensor):
        return as_mask(mask, keys) if is_of_one(mask) else mask
    if mask.mask is not None:
        return by_lists(mask.mask, queries)
    if not mask.causal and mask.window is None:
        return None
    return by_distance(queries, keys, mask.window, device)
