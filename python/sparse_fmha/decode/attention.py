"""Decode attention: the public function."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparse_fmha import skipping
from sparse_fmha._ops import derivatives, errors, symbolic
from sparse_fmha.attention import _calls, _scores
from sparse_fmha.decode import arguments
from sparse_fmha.decode.arguments import Blocks, Keys, Tokens
from sparse_fmha.skipping import SkipStats

# out, then lse and the tile counts if requested.
Output = Tensor | tuple[Tensor, Tensor | SkipStats] | tuple[Tensor, Tensor, SkipStats]
INTS = (int, type(None))  # what the op receives unchanged


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    page_table: Tensor | None = None,
    blocks: Blocks | None = None,
    tokens: Tokens | None = None,
    head_starts: Tensor | None = None,
    head_lengths: Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    page_table: Tensor | None = None,
    blocks: Blocks | None = None,
    tokens: Tokens | None = None,
    head_starts: Tensor | None = None,
    head_lengths: Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    page_table: Tensor | None = None,
    blocks: Blocks | None = None,
    tokens: Tokens | None = None,
    head_starts: Tensor | None = None,
    head_lengths: Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
) -> tuple[Tensor, SkipStats]: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    page_table: Tensor | None = None,
    blocks: Blocks | None = None,
    tokens: Tokens | None = None,
    head_starts: Tensor | None = None,
    head_lengths: Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    return_lse: Literal[True],
    return_stats: Literal[True],
) -> tuple[Tensor, Tensor, SkipStats]: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    page_table: Tensor | None = None,
    blocks: Blocks | None = None,
    tokens: Tokens | None = None,
    head_starts: Tensor | None = None,
    head_lengths: Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output: ...


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    page_table: Tensor | None = None,
    blocks: Blocks | None = None,
    tokens: Tokens | None = None,
    head_starts: Tensor | None = None,
    head_lengths: Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    split_tokens: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Attention of the newest tokens of each request over the keys of a cache.

    The keys of a KV head are numbered by their positions 0 to N - 1, of which the last Lq belong to
    the queries: query i has position N - Lq + i. With `causal`, one below 0 sees no key.

    Args:
        q: `[B, Lq, Hq, D]`, fp16, bf16, fp32 or fp64; the last stride is 1, the others are free. D
            is a multiple of 8, at most 256.
        k_cache: `[B, rows, Hkv, D]`, or with `page_table` `[pages, page, Hkv, D]`, pages of any
            size; with q's dtype. Hq is a multiple of Hkv. The last stride is 1, the others are
            free, also 0 and beyond 2^31. Only rows that some query sees are read.
        v_cache: like k_cache.
        seq_lens: int32 `[B]` or `[B, Hkv]`, the number N of keys, with those of q. Clamped to what
            the cache holds; 0 for a request that is padding. Here and below, the values of int32
            tensors are read when the call runs, strides are free, and what is out of range is
            ignored.
        page_table: int32 `[B, n]` or `[B, Hkv, n]`; position j is row j % page of page
            `page_table[b, j // page]`.
        blocks: `(indices, counts, block)`: each KV head has only the positions in the listed blocks
            of 16, 32, 64 or 128 of them. int32 `[B, Hkv|1, n]` in any order, and `[B, Hkv|1]`.
        tokens: `(indices, counts or None)`: only the listed positions. int32 `[B, Lq|1, Hkv|1, n]`
            in any order, and `[B, Lq|1, Hkv|1]`; None takes all n. In both lists an entry outside
            the keys, such as -1, is ignored, and one that is listed twice counts twice.
        head_starts, head_lengths: int32 `[B, Hkv]`: each KV head has only a span of positions,
            which ends with the keys of q: N of the head is the end of its span, where the query
            positions and `window` count from.
        tree_mask: int32 `[B, Lq, ceil(Lq / 32)]`: query i sees the key of query j iff bit j % 32 of
            `tree_mask[b, i, j // 32]` is set, in place of `causal`. For trees of drafts.
        causal: query i sees position j only if `j <= N - Lq + i`.
        window: query i sees position j only if `j > N - Lq + i - window`: itself and `window - 1`
            keys before.
        scale: factor of q.k; default `D**-0.5`. May be negative.
        softcap: if it is not 0, scores are softcap * tanh(scale * q.k / softcap) (Gemma 2,
            arXiv:2408.00118), before anything else changes them: in natural-log units, finite and
            at least 0. The values of `sink` are not capped.
        sink: fp32 `[Hq]`, one more logit in each row's denominator, which has no value.
        skip_threshold: lambda, 0 <= lambda < 1, or an fp32 tensor `[B]`, whose values are clamped
            to that range (BLASST, arXiv:2512.12087). A KV head's keys are visited in tiles of 64,
            which end at multiples of 64 of a range, or of a list's keys. A tile is skipped, and
            its values are not read, if for each row that sees a key of it the largest score (with
            its cap) is below the largest of the tiles before by more than ln(1 / lambda). Up to
            64 rows of (query, head of the group) vote together. The first tile of each split is
            kept.
        split_tokens: a multiple of 64: the keys of a head are cut there into parts that threads
            work on, and whose results are merged in order. None takes 1024 on the CPU, where a
            result depends bit for bit on its own request alone, not on the number of threads.
            On a GPU None gives each multiprocessor the same number of tiles, so the last bits of a
            result depend on the lengths of the other requests; a number makes them independent, and
            the results to be merged then take up to `8 * B * Lq * Hq * D` bytes for each
            split_tokens that a request has room for in the cache or its row of the page table.
        out: like q, with any strides but 0; takes the result.
        return_lse: also return the log-sum-exp.
        return_stats: also return how many tiles were visited and skipped.

    Returns:
        `out`, `[B, Lq, Hq, D]`. With `return_lse` also `lse`, `[B, Lq, Hq]` in fp32, the natural
        log of the sum of exp(score) over the keys that are seen and not skipped, and of exp(sink).
        With `return_stats` also a `SkipStats` with `[B, Hkv]`, last. A row that sees no key has
        out 0, and lse -inf or its sink.

    What no query sees may hold NaN: ends of pages, pages that are not listed, padded requests.
    The values of a key that only some of a request's queries see must not. Autocast casts nothing
    here. There are no derivatives: asking for one raises NotImplementedError.

    `merge` joins the results of calls over disjoint keys, such as a shared prefix.

    Raises:
        ValueError: a shape, stride, device or number that is not allowed.
        TypeError: an argument of the wrong type, or a dtype that is not allowed.
        NotImplementedError: CUDA tensors in fp32 or fp64, for which there are no kernels.
    """
    keys = Keys(
        page_table,
        *arguments.of_blocks(blocks),
        *arguments.of_tokens(tokens),
        head_starts,
        head_lengths,
        tree_mask,
        causal,
        window,
        scale,
        sink,
    )
    tensors = (q, k_cache, v_cache, seq_lens)
    results = _run(*tensors, keys, softcap, skip_threshold, split_tokens, out, return_stats)
    if return_stats:
        stats = SkipStats(*results[2].unbind(-1))
        return (results[0], results[1], stats) if return_lse else (results[0], stats)
    return (results[0], results[1]) if return_lse else results[0]


def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    keys: Keys,
    softcap: float,
    skip_threshold: float | Tensor,
    split_tokens: int | None,
    out: Tensor | None,
    counted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the op; Python checks first only what the op may not see (see `_calls`)."""

    def check() -> None:
        arguments.check(q, k_cache, v_cache, seq_lens, keys, split_tokens, out)
        _scores.checked_softcap(softcap)

    cap = _scores.given(softcap)  # behind the other arguments, as in all ops
    tensors = [x for x in (q, k_cache, v_cache, seq_lens, *keys, out) if isinstance(x, Tensor)]
    typed = type(keys.causal) is bool and type(keys.block) is int
    typed = typed and type(keys.window) in INTS and type(split_tokens) in INTS
    plain = typed and _calls.op_checks(keys.scale, *tensors)
    if not plain:
        check()
    try:
        threshold = None
        if counted or type(skip_threshold) is not float or skip_threshold != 0:
            threshold = skipping.threshold_of(skip_threshold, q, counted)
        first = (q, k_cache, v_cache, seq_lens)
        rest = (*keys, threshold, split_tokens, *cap)
        if not plain or derivatives.wanted(*first, out, *rest):
            return _call(first, out, rest)
        with torch._C._AutoDispatchBelowAutograd():
            return _call(first, out, rest)
    except (RuntimeError, ValueError, TypeError, AttributeError) as refusal:
        if plain:
            try:
                check()
            except (ValueError, TypeError) as error:
                raise error from None
        if isinstance(refusal, NotImplementedError):
            raise
        raise errors.typed(refusal) from None


def _call(
    first: tuple[Tensor, ...], out: Tensor | None, rest: tuple[object, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    if out is None:
        results: tuple[Tensor, Tensor, Tensor] = symbolic.call("decode", *first, *rest)
        return results
    lse, tiles = symbolic.call("decode_out", *first, out, *rest)
    return out, lse, tiles
