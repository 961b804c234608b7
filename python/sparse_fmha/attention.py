"""The public functions: they check their arguments and call the ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from sparse_fmha import _calls, skipping
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.operands import has_lengths
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.skipping import SkipStats

# out, then lse and the counts of tiles where they are asked for.
Output = Tensor | tuple[Tensor, Tensor | SkipStats] | tuple[Tensor, Tensor, SkipStats]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Dense or causal attention: softmax(scale * q k^T) v.

    The forward of FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 1), which never
    stores the scores.

    Args:
        q: `[B, Lq, Hq, D]`; fp16 or bf16, on the CPU also fp32 and fp64. D is a multiple of 8 up to
            256. Any strides with a unit last one. On CUDA a tensor whose other strides are no
            multiples of 8 elements, or whose data are not 16-byte aligned, is copied first.
        k: `[B, Lkv, Hkv, D]`, of q's dtype and device; Hq is a multiple of Hkv (GQA, MQA).
        v: like k. NaN or infinity here can reach queries that do not see the key, in this and all
            other functions: hidden keys have weight 0, and 0 times NaN is NaN. Set the values of
            padding to 0; k may hold anything there.
        causal: query i sees key j only if `j <= i + (Lkv - Lq)`: the last query sees the last key.
        scale: of q.k; default `D**-0.5`. May be negative.
        skip_threshold: lambda, 0 <= lambda < 1, or fp32 `[B]` on q's device, which counts as held
            to that range (NaN as 0): key tiles whose weights are all below lambda times the largest
            so far are left out (BLASST, arXiv:2512.12087): tiles go from the last
            key to the first, and 64 query rows decide together. 0 leaves out nothing.
            `sparse_fmha.calibration` finds a lambda; `reference.skip_attention` has the rule.
        return_lse: also return the log-sum-exp.
        return_stats: also return how many tiles were visited and skipped.

    Returns:
        `out`, `[B, Lq, Hq, D]`, contiguous, in q's dtype; with `return_lse` also `lse`,
        `[B, Lq, Hq]` in fp32: the natural log of the sum of exp(scale * q.k) over the visible keys
        that are not left out; with `return_stats` last a `SkipStats`. A query that sees no key has
        out 0 and lse -inf.

    Under `torch.autocast` the inputs are cast to its dtype. There are no derivatives yet: asking
    for one, in reverse or forward mode, raises NotImplementedError. `torch.vmap` works.

    Raises:
        ValueError: a shape, stride, device or number that is not allowed.
        TypeError: an argument of the wrong type, or a dtype that is not allowed.
        RuntimeError: CUDA tensors that no compiled kernel takes.
    """
    check = partial(_calls.check_attention, q, k, v, causal, scale)
    rest = None
    if type(causal) is bool and _calls.op_checks(scale, q, k, v):
        rest = causal, scale
    return _run("fmha", q, k, v, rest, check, skip_threshold, return_lse, return_stats)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Generalized neighborhood attention on a grid of one to three axes.

    Every query sees a window of W keys on each axis, around it where `stride` is 1, or around the
    leader of its group of `stride` queries; at the borders the window shifts and keeps its size
    (Hassani et al. 2025, "Generalized Neighborhood Attention", arXiv:2504.16922). With dilation d a
    query sees the keys of its own residue modulo d. On a causal axis it sees no key behind it.

    Args:
        q: `[B, *L, Hq, D]` with one to three token axes `*L`; dtypes, strides and D as `attention`.
        k: `[B, *L, Hkv, D]` on the same grid; Hq is a multiple of Hkv.
        v: like k.
        window: W of each axis in tokens, at least 1, which is the query's own place on that axis;
            W * dilation may not pass the axis's length.
        stride: of each axis, 1 (neighborhood attention) to W (blocked attention).
        dilation: of each axis, at least 1.
        causal: of each axis.
        scale: of q.k; default `D**-0.5`. May be negative.
        extra_k: `[B, N, Hkv, D]`: tokens without a place on the grid that every query sees too.
        extra_v: like extra_k.
        skip_threshold, return_lse, return_stats: as `attention`.

        One int (or bool) for window, stride, dilation or causal serves all axes.

    Returns:
        `out`, `[B, *L, Hq, D]`, contiguous, in q's dtype; with `return_lse` also `lse`,
        `[B, *L, Hq]` in fp32, natural log, as `attention`.

    Autocast and gradients as `attention`.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention`; also for a window
            larger than the grid, a stride over the window, a tuple of the wrong length.
    """
    given = window, stride, dilation, causal, scale, extra_k, extra_v
    check = partial(_calls.check_neighborhood, q, k, v, *given)
    rest = None
    extra = () if extra_k is extra_v is None else (extra_k, extra_v)
    if _calls.op_checks(scale, q, k, v, *extra):
        axes = q.dim() - 3
        of_axes = (
            _calls.per_axis(window, axes, int),
            _calls.per_axis(stride, axes, int),
            _calls.per_axis(dilation, axes, int),
            _calls.per_axis(causal, axes, bool),
        )
        if None not in of_axes:
            rest = *of_axes, scale, extra_k, extra_v
    return _run("neighborhood", q, k, v, rest, check, skip_threshold, return_lse, return_stats)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Attention over the key blocks that a mask lists for each block of queries.

    Time goes with the blocks listed. A full block costs what it does in dense attention; a partial
    one, one at the causal diagonal and the last, ragged one are masked pair by pair.

    Args:
        q: `[B, Lq, Hq, D]`; dtypes, strides and D as `attention`.
        k: `[B, Lkv, Hkv, D]`; Hq is a multiple of Hkv.
        v: like k.
        mask: on q's device, for lengths Lq and Lkv, with lists for B or 1 batch entries and Hq or 1
            heads. Blocks that there are not, and entries behind the list's width, are as if they
            were not listed; a block twice in one row counts twice or once. `BlockMask.validate`
            finds all these.
        scale: of q.k; default `D**-0.5`. May be negative.
        skip_threshold, return_lse, return_stats: as `attention`.

    Returns:
        `out`, `[B, Lq, Hq, D]`, contiguous, in q's dtype; with `return_lse` also `lse`,
        `[B, Lq, Hq]` in fp32, natural log. A query that sees no key has out 0 and lse -inf.

    Autocast and gradients as `attention`. Nothing waits for the device, so the way from scores to a
    mask to the output can be captured in a CUDA graph.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention`; also for a mask of
            other lengths, another device, or lists for another number of heads or batch entries.
    """
    check = partial(_calls.check_block_sparse, q, k, v, mask, scale)
    rest = None
    if type(mask) is BlockMask and _calls.op_checks(scale, q, k, v, mask.counts):
        rest = _calls.block_arguments(mask, scale) if has_lengths(mask, q, k) else None
    return _run("block_sparse", q, k, v, rest, check, skip_threshold, return_lse, return_stats)


def stripe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    *,
    scale: float | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Attention over single keys and short runs of keys that a mask lists for groups of queries.

    The third stage of AnchorAttention (Zhang et al. 2025, arXiv:2505.23520), and what
    vertical-slash patterns need (Jiang et al. 2024, arXiv:2407.02490): keys are gathered one by
    one, runs are read as they lie, and one softmax is over both.

    Args:
        q: `[B, Lq, Hq, D]`; dtypes, strides and D as `attention`.
        k: `[B, Lkv, Hkv, D]`; Hq is a multiple of Hkv.
        v: like k.
        mask: on q's device, for lengths Lq and Lkv, with lists for B or 1 batch entries and Hq or 1
            heads. Keys that there are not are as if they were not listed; one that is listed twice
            counts twice. `StripeMask.validate` finds both.
        scale: of q.k; default `D**-0.5`. May be negative.
        skip_threshold, return_lse, return_stats: as `attention`.

    Returns:
        `out`, `[B, Lq, Hq, D]`, contiguous, in q's dtype; with `return_lse` also `lse`,
        `[B, Lq, Hq]` in fp32, natural log. A query that sees no key has out 0 and lse -inf.

    Autocast and gradients as `attention`.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention`; also for a mask of
            other lengths, another device, or lists for another number of heads or batch entries.
    """
    check = partial(_calls.check_stripe, q, k, v, mask, scale)
    rest = None
    if type(mask) is StripeMask and _calls.op_checks(scale, q, k, v, mask.counts):
        rest = _calls.stripe_arguments(mask, scale) if has_lengths(mask, q, k) else None
    return _run("stripe", q, k, v, rest, check, skip_threshold, return_lse, return_stats)


def _run(
    mechanism: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rest: tuple | None,
    check: _calls.Check,
    skip_threshold: float | Tensor,
    return_lse: bool,
    return_stats: bool,
) -> Output:
    """Calls the mechanism's op, as `_calls.run`, and returns what is asked for."""
    name = f"{mechanism}_fwd"
    results = _calls.run(name, q, k, v, rest, check, skip_threshold, return_stats)
    if return_stats:
        stats = skipping.SkipStats(*results[2].unbind(-1))
        return (*results[:2], stats) if return_lse else (results[0], stats)
    return tuple(results[:2]) if return_lse else results[0]
