"""What the backends for servers share: a batch of requests over one cache in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sparse_fmha.decode import decode_attention


class Batch(NamedTuple):
    """Requests of one token each, then others; tokens are packed in this order."""

    page_table: Tensor  # int32 [requests, pages of a request]
    seq_lens: Tensor  # int32 [requests], with the new tokens
    decodes: int  # requests of one token
    others: Sequence[int]  # new tokens of each other request


class Heads(NamedTuple):
    """What a layer says of its attention."""

    scale: float | None
    window: int | None  # keys that a query sees, with its own
    sink: Tensor | None  # fp32 [Hq]


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: Batch,
    heads: Heads,
    causal: bool,
    out: Tensor,
) -> None:
    """Writes the attention of a batch: one call for all decodes, one for each other request.

    Args:
        q: `[tokens, Hq, D]`. k_pages, v_pages: `[pages, page, Hkv, D]`, with the new tokens' keys.
        out: like q; rows behind the batch's tokens are left as they are.
    """

    def call(requests: slice, tokens: slice, each: int) -> None:
        rows = q[tokens].unflatten(0, (-1, each))
        decode_attention(
            rows,
            k_pages,
            v_pages,
            batch.seq_lens[requests],
            page_table=batch.page_table[requests],
            causal=causal,
            window=heads.window,
            scale=heads.scale,
            sink=heads.sink,
            out=out[tokens].unflatten(0, (-1, each)),
        )

    first = batch.decodes
    if first:
        call(slice(first), slice(first), 1)
    start = first
    for request, count in enumerate(batch.others, first):
        if count:
            call(slice(request, request + 1), slice(start, start + count), count)
        start += count
