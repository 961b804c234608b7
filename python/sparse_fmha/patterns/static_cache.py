"""Static patterns as the keys of a cache: what one new token sees of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_int, check_integers, check_shape, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.patterns.moa import spans_of

BLOCKS = (16, 32, 64, 128)  # of decode_attention

Blocks = tuple[Tensor, Tensor, int]


@plain_ints
def power_attention_cache(
    seq_lens: Tensor,
    kv_len: int,
    *,
    sink_blocks: int = 1,
    local_blocks: int = 5,
    block: int = 256,
    block_kv: int = 128,
) -> Blocks:
    """Returns the row of `power_attention` for each request's newest token, as `blocks`.

    See `power_attention` for the formula, its source and its defaults. Nothing waits for the
    device.

    Args:
        seq_lens: int `[B]`, keys with that of the new token.
        kv_len: the most keys that a request can have.
        sink_blocks, local_blocks, block: of the formula.
        block_kv: blocks of `decode_attention`; divides `block`.

    Returns:
        indices `[B, 1, n]`, counts `[B, 1]`, both int32, and `block_kv`.

    Raises:
        ValueError, TypeError: a size is not allowed.
    """
    check_int("sink_blocks", sink_blocks)
    check_int("local_blocks", local_blocks, 1)
    row, blocks = _rows(seq_lens, kv_len, block, block_kv)
    least = (local_blocks - 1).bit_length()  # of the exponents whose powers are not local
    powers = 1 << torch.arange(least, max(least, blocks.bit_length()), device=row.device)
    back = torch.cat([torch.arange(min(local_blocks, blocks), device=row.device), powers])
    sinks = torch.arange(min(sink_blocks, blocks), device=row.device).expand(*row.shape[:2], -1)
    columns = torch.cat([sinks, row - back], -1)
    seen = torch.cat([sinks <= row, row - back >= sink_blocks], -1)
    return _listed(columns, seen, block, block_kv)


@plain_ints
def s2_attention_cache(
    seq_lens: Tensor,
    kv_len: int,
    heads_kv: int,
    *,
    local_blocks: int = 16,
    stride: int = 8,
    block: int = 64,
    head_offset: int = 0,
    total_heads: int | None = None,
    block_kv: int = 64,
) -> Blocks:
    """Returns the row of `s2_attention` for each request's newest token, as `blocks`.

    See `s2_attention` for the formula, its source and its defaults. The query heads of a group
    share a list, so h of the formula is the KV head. Nothing waits for the device.

    Args:
        seq_lens: int `[B]`, keys with that of the new token.
        kv_len: the most keys that a request can have.
        heads_kv: KV heads of the cache.
        local_blocks, stride, block: of the formula.
        head_offset: index of the first KV head in the whole model; `total_heads`: its KV heads,
            default `head_offset + heads_kv`.
        block_kv: blocks of `decode_attention`; divides `block`.

    Returns:
        indices `[B, Hkv, n]`, counts `[B, Hkv]`, both int32, and `block_kv`.

    Raises:
        ValueError, TypeError: a size is not allowed.
    """
    check_int("heads_kv", heads_kv, 1)
    check_int("local_blocks", local_blocks, 1)
    check_int("stride", stride, 1)
    check_int("head_offset", head_offset)
    if total_heads is None:
        total_heads = head_offset + heads_kv
    check_int("total_heads", total_heads, head_offset + heads_kv)
    row, blocks = _rows(seq_lens, kv_len, block, block_kv)
    head = head_offset + torch.arange(heads_kv, device=row.device)[:, None]
    first = (-1 - head * max(1, stride // total_heads)) % stride
    strided = first + torch.arange(0, blocks, stride, device=row.device)
    near = row - torch.arange(min(local_blocks, blocks), device=row.device)
    shape = (len(row), heads_kv, -1)
    columns = torch.cat([near.expand(shape), strided.expand(shape)], -1)
    far = (strided <= row - local_blocks).expand(shape)
    return _listed(columns, torch.cat([near.expand(shape) >= 0, far], -1), block, block_kv)


@plain_ints
def streaming_llm_cache(positions: Tensor, *, window: int = 1020, sink: int = 4) -> Tensor:
    """Returns the rows of a ring that holds what `streaming_llm` lets a new token see.

    Token p is in row p if `p < sink`, else in row `sink + (p - sink) % window`, where it overwrites
    the token that leaves the window. Write the new token, then call `decode_attention` with
    `seq_lens = min(N, sink + window)`, for one new token of each request. See `streaming_llm` for
    the source and the defaults.

    Args:
        positions: int, any shape, the tokens' places in their sequences.
        window: tokens, at least 1. sink: tokens, at least 0.

    Returns:
        int64, like `positions`.

    Raises:
        ValueError, TypeError: a size is not allowed.
    """
    check_int("window", window, 1)
    check_int("sink", sink)
    check_integers("positions", positions)
    positions = positions.long()
    return torch.where(positions < sink, positions, sink + (positions - sink) % window)


class MoaCache:
    """Where a cache keeps the tokens that each KV head of MoA sees: a sink and a ring of its own.

    The rows of all heads lie one behind the other, `[B, rows, D]`: a head has as many as its span.
    It keeps the first `sink` tokens and the `span - sink` newest ones, token by token, where the
    mask of `moa` has a band of whole blocks. Source and spans: see `moa`. The heads of a group
    share a span.

    Args:
        kv_len: the length N that spans are made for; a longer sequence keeps them.
        alphas, betas: one for each KV head, in tokens and tokens per token.
        sink, min_span, block: as in `moa`.
        device: of what the methods return.

    Attributes:
        spans: tokens that each head keeps. rows: their sum.

    Raises:
        ValueError, TypeError: as in `moa`.
    """

    @plain_ints
    def __init__(
        self,
        kv_len: int,
        alphas: Sequence[float],
        betas: Sequence[float],
        *,
        sink: int = 64,
        min_span: int = 128,
        block: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        spans = spans_of(kv_len, alphas, betas, sink=sink, min_span=min_span, block=block)
        self.spans, self.rows, self.sink = tuple(spans), sum(spans), sink
        self._spans = torch.tensor(spans, dtype=torch.int64, device=device)
        self._starts = self._spans.cumsum(0) - self._spans

    def places(self, positions: Tensor) -> Tensor:
        """Returns the rows of tokens, int64 `[..., Hkv]`, from their places int `[...]`."""
        check_integers("positions", positions)
        at = positions.long()[..., None]
        ring = (at - self.sink) % (self._spans - self.sink)
        return self._starts + torch.where(at < self.sink, at, self.sink + ring)

    def keys(self, seq_lens: Tensor) -> dict[str, Tensor]:
        """Returns `seq_lens`, `head_starts` and `head_lengths` of `decode_attention`.

        For one new token of each request, after it has been written. The caches that go with them
        are `rows.unsqueeze(2).expand(-1, -1, Hkv, -1)`.

        Args:
            seq_lens: int `[B]`, tokens so far.
        """
        check_integers("seq_lens", seq_lens)
        check_shape("seq_lens", seq_lens, ("batch",))
        lengths = torch.minimum(seq_lens.long()[:, None], self._spans).clamp(min=0)
        return {
            "seq_lens": torch.full_like(seq_lens, self.rows, dtype=torch.int32),
            "head_starts": self._starts.expand_as(lengths).int(),
            "head_lengths": lengths.int(),
        }


def _rows(seq_lens: Tensor, kv_len: int, block: int, block_kv: int) -> tuple[Tensor, int]:
    """Returns the block of each newest token, int64 `[B, 1, 1]` (-1: none), and their number."""
    check_int("kv_len", kv_len)
    if check_int("block_kv", block_kv) not in BLOCKS:
        raise ValueError(f"block_kv must be 16, 32, 64 or 128, got {block_kv}")
    if check_int("block", block, 1) % block_kv:
        raise ValueError(f"block_kv must divide the pattern's block of {block}, got {block_kv}")
    check_integers("seq_lens", seq_lens)
    check_shape("seq_lens", seq_lens, ("batch",))
    newest = seq_lens.long().clamp(0, kv_len) - 1
    return newest.div(block, rounding_mode="floor")[:, None, None], ceil_div(kv_len, block)


def _listed(columns: Tensor, seen: Tensor, block: int, block_kv: int) -> Blocks:
    """Lists the blocks that are seen, in blocks of `block_kv`."""
    order = seen.byte().argsort(dim=-1, descending=True, stable=True)
    columns = columns.masked_fill(~seen, -1).gather(-1, order)
    parts = block // block_kv
    indices = columns[..., None] * parts + torch.arange(parts, device=columns.device)
    return indices.flatten(-2).int(), (seen.sum(-1) * parts).int(), block_kv
