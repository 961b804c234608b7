"""Attention with sinks or a soft cap for few queries, in torch's own functions."""

from __future__ import annotations

import torch
from torch import Tensor


def with_sink(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    scale: float | None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention with one more logit in each row's softmax, without a value, or with capped scores.

    Scores are stored, in fp32: for the one query of a decoding step.

    Args:
        query: `[B, Hq, Lq, D]`. key, value: `[B, Hkv, Lkv, D]`.
        mask: broadcastable to `[B, Hq, Lq, Lkv]`; bool (True is seen), or added to the scores; or
            None.
        sink: fp32 `[Hq]`, or None. softcap: as of `attention`.

    Returns:
        `[B, Lq, Hq, D]`.
    """
    heads_kv, keys = key.shape[1], key.shape[2]
    grouped = query.unflatten(1, (heads_kv, -1))  # [B, Hkv, group, Lq, D]
    with torch.autocast(query.device.type, enabled=False):
        q = grouped.float() * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = (q.flatten(2, 3) @ key.float().mT).view(*grouped.shape[:-1], keys).flatten(1, 2)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if mask is not None:
            mask = mask[..., :keys]
            hidden = mask.logical_not() if mask.dtype == torch.bool else None
            scores = scores + mask if hidden is None else scores.masked_fill(hidden, -torch.inf)
        if sink is not None:
            column = sink[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], 3)
        weights = scores.softmax(3)[..., :keys]
        rows = weights.unflatten(1, (heads_kv, -1)).flatten(2, 3) @ value.float()
    out: Tensor = rows.view(grouped.shape).flatten(1, 2).transpose(1, 2).to(query.dtype)
    return out.contiguous()
