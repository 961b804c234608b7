"""One query of each batch entry, as in decoding: which keys it sees, as a tensor, and the call.

They are int32 `[B, 1, 1, 3]`, the first key, how many, and one past the last, where they follow
each other. With padding between them their positions are behind these numbers, ascending, then -1:
`[B, 1, 1, 3 + tokens]`. transformers passes 4-dimensional tensors on as they are, to compiled
functions, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.decode import decode_attention

NUMBERS = 3  # before positions


def seen_by_one(
    batch: int,
    keys: int | Tensor,
    first: int | Tensor,
    real: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """The keys from `first` to `keys` that are real.

    Args:
        keys, first: numbers, or tensors of one number.
        real: bool `[B, tokens]`, or None if all are. Reading it waits for the device.
    """

    def column(value: int | Tensor) -> Tensor:
        if isinstance(value, int):
            return torch.full((batch,), value, dtype=torch.int32, device=device)
        return value.to(device=device, dtype=torch.int32).reshape(-1).expand(batch)

    start, stop = column(first), column(keys)
    count, positions = stop - start, []
    if real is not None:
        tokens = real.shape[1]
        at = torch.arange(tokens, device=real.device)
        seen = real & (at >= start[:, None]) & (at < stop[:, None])
        count = seen.sum(1)
        start = seen.int().argmax(1)
        stop = torch.where(count > 0, tokens - seen.int().flip(1).argmax(1), start)
        if not bool((count == stop - start).all()):
            order = torch.where(seen, at, tokens).sort(1).values
            positions = [order.masked_fill(order == tokens, -1).int()]
    numbers = torch.stack([x.to(torch.int32) for x in (start, count, stop)], 1)
    return torch.cat([numbers, *positions], 1)[:, None, None]


def is_of_one(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape[1:3] == (1, 1) and mask.shape[3] >= NUMBERS


def as_mask(seen: Tensor, keys: int) -> Tensor:
    """Bool `[B, 1, 1, keys]`, True where a key is seen."""
    at = torch.arange(keys, device=seen.device)
    if seen.shape[3] == NUMBERS:
        return (at >= seen[..., :1]) & (at < seen[..., 2:])
    listed = seen[..., NUMBERS:].long()
    made = torch.zeros(*seen.shape[:3], keys + 1, dtype=torch.bool, device=seen.device)
    return made.scatter_(3, torch.where(listed < 0, keys, listed), True)[..., :keys]


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float | None,
    sink: Tensor | None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one query of each batch entry over the keys that it sees.

    Args:
        query: `[B, Hq, 1, D]`. key, value: `[B, Hkv, Lkv, D]`, a cache that may have room behind.

    Returns:
        `[B, 1, Hq, D]`.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    starts, counts, stops = (seen[:, 0, :, i] for i in range(NUMBERS))
    listed = seen.shape[3] > NUMBERS
    heads = k.shape[2]
    return decode_attention(
        q,
        k,
        v,
        stops[:, 0],
        tokens=(seen[..., NUMBERS:], seen[..., 1]) if listed else None,
        head_starts=None if listed else starts.expand(-1, heads),
        head_lengths=None if listed else counts.expand(-1, heads),
        scale=scale,
        softcap=softcap,
        sink=sink,
    )
