"""What the backends for servers share: a batch of requests over one cache in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha.decode import decode_attention
from sparse_fmha.integrations import _packed


class Batch(NamedTuple):
    """Requests of one token each, then others; tokens are packed in this order."""

    page_table: Tensor  # int32 [requests, pages of a request]
    seq_lens: Tensor  # int32 [requests], with the new tokens
    decodes: int  # requests of one token
    others: Sequence[int] = ()  # new tokens of each other request
    starts: Tensor | None = None  # int32 [others + 1], where they begin behind the decodes
    longest: int = 0  # seq_lens of the others, at most


def starts_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """Returns the cumulative sums of counts."""
    sums = torch.tensor([0, *counts], device="cpu").cumsum(0)
    return sums.to(device, torch.int32, non_blocking=True)


class Heads(NamedTuple):
    """What a layer says of its attention."""

    scale: float | None
    window: int | None  # keys that a query sees, with its own
    sink: Tensor | None  # fp32 [Hq]
    softcap: float = 0.0  # of scores; 0: none


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    heads: Heads,
    causal: bool,
    out: Tensor,
) -> None:
    """Writes the attention of a batch: one call for all decodes, one for all other requests.

    Args:
        q: `[tokens, Hq, D]`. k_pages, v_pages: `[pages, page, Hkv, D]`, with the new tokens' keys.
        out: like q; rows behind the batch's tokens are left as they are.
    """
    first = batch.decodes
    if first:
        decode_attention(
            q[:first, None],
            k_pages,
            v_pages,
            batch.seq_lens[:first],
            page_table=batch.page_table[:first],
            causal=causal,
            window=heads.window,
            scale=heads.scale,
            softcap=heads.softcap,
            sink=heads.sink,
            out=out[:first, None],
        )
    most = max(batch.others, default=0)
    if not most:
        return
    assert batch.starts is not None, "others have starts"
    tokens = slice(first, first + sum(batch.others))
    out[tokens], _ = _packed.attend(
        q[tokens],
        k_pages,
        v_pages,
        batch.starts,
        None,
        most,
        batch.longest,
        (-1 if heads.window is None else heads.window - 1, 0 if causal else -1),
        heads.scale,
        seqused_k=batch.seq_lens[first:],
        page_table=batch.page_table[first:],
        sink=heads.sink,
        softcap=heads.softcap,
    )
