"""Attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparse_fmha import _checks, skipping
from sparse_fmha._ops import errors
from sparse_fmha.attention import _calls
from sparse_fmha.attention._scores import add_sink, check_sink, checked_softcap
from sparse_fmha.varlen.checks import check_out, check_varlen
from sparse_fmha.varlen.lists import over_lists
from sparse_fmha.varlen.pages import over_pages, recorded


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    out: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    out: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense or causal attention of packed sequences, each to its own keys.

    The tokens of all sequences are in one dimension, one sequence after the other, without padding:
    sequence b has the queries `q[cu_q[b]:cu_q[b + 1]]` and the keys `k[cu_k[b]:cu_k[b + 1]]`. B is
    the number of sequences.

    Args:
        q: `[Tq, Hq, D]`. For dtypes, strides and D see `attention`.
        k: `[Tk, Hkv, D]`, or with page_table `[pages, page, Hkv, D]`, any page size; Hq is a
            multiple of Hkv.
        v: like k.
        cu_q: int32 `[B + 1]` on q's device, cumulative lengths of the queries: where each sequence
            starts, then where the last one ends. Values are clamped to 0 and Tq, and one below an
            earlier one counts as that one: the sequence is empty. Tokens before `cu_q[0]` and from
            `cu_q[-1]` on are in no sequence.
        cu_k: the same for the keys. None only with page_table and seqused_k. Pass cu_q itself if
            both are the same: on CUDA the lists of the backward pass are shorter then.
        max_q: upper bound of the queries of a sequence.
        max_k: upper bound of the keys of a sequence that are in use. On the CPU a longer sequence
            raises. On CUDA the values of cu_q and cu_k are not read by the host, and what a longer
            sequence returns is not specified.
        causal: query i of a sequence with Lq queries and Lk keys in use sees key j only if
            `j <= i + (Lk - Lq)`: its last query sees its last key.
        seqused_k: int32 `[B]`, how many keys of each sequence are in use, from its start; clamped
            to 0 and its length. Without it, all are.
        page_table: int32 `[B, pages of a sequence]`: token n of sequence b is in row `n % page` of
            page `page_table[b, n // page]`. The keys in use are seqused_k, or without it the
            lengths by cu_k, at most as many as the row has room for. Keys of a page that does not
            exist are not visible.
        scale: factor of q.k; default `D**-0.5`. May be negative.
        softcap: see `attention`.
        sink: fp32 `[Hq]`, one more logit in the denominator of each row, without a value, as in
            gpt-oss. Differentiable.
        skip_threshold: see `attention`; a tensor is `[B]`, one for each sequence. On CUDA only a
            number, and tiles and groups of rows lie on the packed dimension, so other tiles may be
            skipped than on the CPU; with page_table also a tensor, and tiles of each sequence.
        out: `[Tq, Hq, D]`, in q's dtype, to write the result to. All rows are written.
        return_lse: also return the log-sum-exp.

    Returns:
        `out`, `[Tq, Hq, D]`, in q's dtype; with `return_lse` also `lse`, `[Tq, Hq]` in fp32,
        natural log, with the sink. A query that sees no key has out 0 and lse -inf, or with a sink
        lse equal to the sink. A token without a sequence has out 0, lse -inf and gradient 0. What
        such tokens, keys not in use, unread pages and the ends of pages hold reaches no result.

    For autocast and gradients see `attention`: out and lse are differentiable with respect to q, k,
    v and sink. These raise NotImplementedError: a gradient where tiles may be skipped, and one
    where keys are in pages, on CUDA already the call that would have one.

    The op `varlen_fwd` runs it. On the CPU it takes one sequence after the other, and many short
    ones share the threads. On Hopper one kernel takes the query tiles of all sequences, heaviest
    first; a plan made on the device says where they lie, and with page_table the pages of each
    sequence are first copied next to each other, `B * max_k` keys and values.

    On CUDA the backward pass, `skip_threshold`, `softcap`, and every call on GPUs other than Hopper
    are `block_sparse_attention` on the packed dimension, with a mask built on the device without
    waiting for it. There NaN or infinity in v can reach a neighboring sequence, as among hidden
    keys of `attention`, and if cu_k is not cu_q, the bitmasks of two or more sequences take
    `Tq * Tk / 8` bytes. With page_table, queries are then copied, too, padded to max_q.

    Raises:
        ValueError: a shape, stride, device or number that is not allowed; out is given where a
            gradient is wanted.
        TypeError: an argument of the wrong type, or a dtype that is not allowed.
        RuntimeError: on the CPU, a sequence longer than max_q or max_k; else as in `attention`.
        NotImplementedError: a threshold for each sequence on CUDA, without page_table.
    """
    check_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, seqused_k, page_table)
    scale, cap = _checks.finite("scale", scale), checked_softcap(softcap)
    threshold = skipping.threshold_of(skip_threshold, cu_q[1:], False)
    if sink is not None:
        check_sink(sink, q)
    check_out(out, q, k, v, sink)
    is_plain = threshold is None and cap == 0 and not (page_table is not None and recorded(q, k, v))
    if _runs_over_lists(q, is_plain):
        results = _over_lists(
            *(q, k, v, cu_q, cu_k, max_q, max_k, causal, seqused_k, page_table, scale),
            skip_threshold,
            cap,
        )
    else:
        lists = (_plain(cu_q), _plain(cu_k), max_q, max_k, causal, scale)
        rest = (*lists, _plain(seqused_k), _plain(page_table), threshold, cap)
        found = _calls.run("varlen_fwd", q, k, v, None, lambda: rest, 0.0, False)
        results = found[0], found[1]
    if sink is not None:
        results = with_sink(*results, sink, cu_q)
    result, lse = results
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def _plain(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _runs_over_lists(q: Tensor, is_plain: bool) -> bool:
    """is_plain: whether the call is what kernels of packed sequences are for."""
    return q.device.type == "cuda" and not (is_plain and _has_packed_kernels(q.device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_packed_kernels(device: torch.device) -> bool:
    """Whether calls take Hopper's kernels, which alone have rows for packed sequences."""
    capability = torch.cuda.get_device_capability(device)
    try:
        from sparse_fmha._extension import _C
    except ImportError:  # the ops work without it, and then there is no override
        return capability == (9, 0)
    return _C.arch_for_call(*capability) == "sm90"


def _over_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    scale: float | None,
    skip_threshold: float | Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    if page_table is not None:
        return over_pages(
            *(q, k, v, cu_q, cu_k, max_q, max_k, causal, seqused_k, page_table, scale),
            skip_threshold=skip_threshold,
            softcap=softcap,
        )
    assert cu_k is not None  # checked
    if isinstance(skip_threshold, Tensor):
        raise errors.on_cpu_only(
            "varlen_attention with skip_threshold as a tensor",
            " or give one number for all sequences",
        )
    return over_lists(
        *(q, k, v, cu_q, cu_k, max_q, max_k, causal, seqused_k, scale),
        skip_threshold=skip_threshold,
        softcap=softcap,
    )


def with_sink(out: Tensor, lse: Tensor, sink: Tensor, cu_q: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a logit to the denominator of each query that is in a sequence."""
    tokens = torch.arange(out.shape[0], device=out.device)
    held = (tokens >= cu_q[0]) & (tokens < cu_q.amax())
    out, lse = add_sink(out, lse, sink)
    return out, torch.where(held[:, None], lse, -torch.inf)
