"""Dense and causal attention."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

from torch import Tensor

from sparse_fmha.attention import _calls
from sparse_fmha.attention._results import Output, run
from sparse_fmha.skipping import SkipStats


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
) -> tuple[Tensor, SkipStats]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[True],
    return_stats: Literal[True],
) -> tuple[Tensor, Tensor, SkipStats]: ...


@overload
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
) -> Output: ...


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

    Under `torch.autocast` the inputs are cast to its dtype. Gradients go through `out` and `lse`
    to every tensor of floats but a threshold; runs on the same input give the same bits. A
    gradient where tiles may be left out (`skip_threshold`, `return_stats`), one on a GPU that has
    no kernel for it, a second derivative and one in forward mode raise NotImplementedError.
    `torch.vmap` works.

    Raises:
        ValueError: a shape, stride, device or number that is not allowed.
        TypeError: an argument of the wrong type, or a dtype that is not allowed.
        RuntimeError: CUDA tensors that no compiled kernel takes.
    """
    check = partial(_calls.check_attention, q, k, v, causal, scale)
    rest = None
    if type(causal) is bool and _calls.op_checks(scale, q, k, v):
        rest = causal, scale
    return run("fmha", q, k, v, rest, check, skip_threshold, return_lse, return_stats)
