"""One query of each batch entry, as in decoding: which keys it sees, as a tensor, and the call.

A mask of one query is a span of keys where its padding is at the ends: int32 `[B, 1, 1, 3]`, the
first key, how many, and one past the last. transformers passes 4-dimensional tensors on as they
are, to compiled functions, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.decode import decode_attention


def span(
    batch: int,
    keys: int | Tensor,
    first: int | Tensor,
    real: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """The span of keys from `first` to `keys` that are real; None if padding lies between them.

    Args:
        keys, first: numbers, or tensors of one number.
        real: bool `[B, tokens]`, or None if all are. Reading it waits for the device.
    """

    def column(value: int | Tensor) -> Tensor:
        if isinstance(value, int):
            return torch.full((batch,), value, dtype=torch.int32, device=device)
        return value.to(device=device, dtype=torch.int32).reshape(-1).expand(batch)

    start, stop = column(first), column(keys)
    if real is not None:
        at = torch.arange(real.shape[1], device=real.device)
        seen = real & (at >= start[:, None]) & (at < stop[:, None])
        count = seen.sum(1)
        start = seen.int().argmax(1)
        stop = torch.where(count > 0, real.shape[1] - seen.int().flip(1).argmax(1), start)
        if not bool((count == stop - start).all()):
            return None
    columns = (start, stop - start, stop)
    return torch.stack([x.to(torch.int32) for x in columns], 1)[:, None, None]


def is_span(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape[1:] == (1, 1, 3)


def as_mask(spans: Tensor, keys: int) -> Tensor:
    """Bool `[B, 1, 1, keys]`, True where a key is seen."""
    at = torch.arange(keys, device=spans.device)
    return (at >= spans[..., :1]) & (at < spans[..., 2:])


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scale: float | None,
    sink: Tensor | None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one query over a span of keys of each batch entry.

    Args:
        query: `[B, Hq, 1, D]`. key, value: `[B, Hkv, Lkv, D]`, a cache that may have room behind.

    Returns:
        `[B, 1, Hq, D]`.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    starts, counts = (spans[:, 0, :, i].expand(-1, k.shape[2]) for i in (0, 1))
    return decode_attention(
        q,
        k,
        v,
        spans[:, 0, 0, 2],
        head_starts=starts,
        head_lengths=counts,
        scale=scale,
        softcap=softcap,
        sink=sink,
    )
