"""Dense and causal attention."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

from torch import Tensor

from sparse_fmha.attention import _calls
from sparse_fmha.attention._results import Output, run
from sparse_fmha.attention._scores import given
from sparse_fmha.skipping import SkipStats


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
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
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
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
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
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
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
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
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
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
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Dense or causal attention: softmax(scale * q k^T) v.

    Uses the forward pass of FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 1), which
    never stores the scores.

    Args:
        q: `[B, Lq, Hq, D]`, fp16 or bf16; on the CPU also fp32 and fp64. D is a multiple of 8, at
            most 256. The last stride is 1, the others are free. On CUDA a tensor is copied first
            if another stride is not a multiple of 8 elements or the data are not 16-byte aligned.
        k: `[B, Lkv, Hkv, D]`, with q's dtype and device; Hq is a multiple of Hkv (GQA, MQA).
        v: `[B, Lkv, Hkv, Dv]`; Dv has the limits of D. Where it is not D, a GPU other than Hopper
            raises NotImplementedError. In this and all other functions, NaN or infinity in v can
            reach queries that do not see the key: hidden keys have weight 0, and 0 times NaN is
            NaN. Set the values of padding to 0; k may hold anything there.
        causal: query i sees key j only if `j <= i + (Lkv - Lq)`: the last query sees the last key.
        scale: factor of q.k; default `D**-0.5`. May be negative.
        softcap: if it is not 0, scores are softcap * tanh(scale * q.k / softcap) (Gemma 2,
            arXiv:2408.00118). Finite, at least 0. On CUDA it runs where key_bias does, within 2^-11
            of a score.
        key_bias: fp32 `[B or 1, Hq or 1, Lkv]`, added to the scores before the softmax. -inf hides
            a key; NaN or +inf makes the queries that see the key NaN, as in torch's softmax. Its
            accuracy is that of fp32 sums, so hide keys by -inf and not by a large number. Skipping
            compares the biased scores. On CUDA it runs on Hopper, without skipping; elsewhere it
            raises NotImplementedError. Gradients on Hopper need finite k where it is -inf.
        sink: fp32 `[Hq]` (or fp64 for fp64 q), one more logit of each query's softmax, which has no
            value (gpt-oss): out is multiplied by sigmoid(lse - sink), and lse becomes
            log(exp(lse) + exp(sink)). A query that sees no key has out 0 and lse = sink; -inf
            changes nothing. Tiles are skipped as without a sink. As lse is fp32, so is the accuracy
            of a result with a sink, also in fp64.
        skip_threshold: lambda, 0 <= lambda < 1, or an fp32 tensor `[B]` on q's device, whose values
            are clamped to that range (NaN becomes 0). Key tiles whose weights are all below lambda
            times the largest so far are skipped (BLASST, arXiv:2512.12087). Tiles are visited from
            the last key to the first, and 64 query rows vote together. 0 skips nothing.
            `sparse_fmha.calibration` finds a lambda; `reference.skip_attention` defines the rule.
        return_lse: also return the log-sum-exp.
        return_stats: also return how many tiles were visited and skipped.

    Returns:
        `out`, `[B, Lq, Hq, Dv]`, contiguous, in q's dtype. With `return_lse` also `lse`,
        `[B, Lq, Hq]` in fp32: the natural log of the sum of exp(score) over the visible keys that
        are not skipped. With `return_stats` also a `SkipStats`, last. A query that sees no key has
        out 0 and lse -inf.

    Under `torch.autocast` the inputs are cast to its dtype. `out` and `lse` are differentiable with
    respect to every floating point tensor except a threshold. Repeated runs on the same input are
    bitwise equal, but for the gradient of q on Hopper at head dims up to 128, unless
    `torch.use_deterministic_algorithms(True)` was set in the forward pass. On Hopper, batch, heads
    and lengths choose the kernel, so the last bits of a row may depend on them. These raise
    NotImplementedError: a call or a gradient on a GPU that has no kernel for it, as for gradients
    where tiles may be skipped (`skip_threshold`, `return_stats`) at head dims above 128 or not on
    Hopper, second derivatives, and forward-mode derivatives. `torch.vmap` is supported.

    Raises:
        ValueError: a shape, stride, device or number that is not allowed.
        TypeError: an argument of the wrong type, or a dtype that is not allowed.
        RuntimeError: this build has no kernels for the GPU.
    """
    biases = given(softcap, key_bias)
    check = partial(_calls.check_attention, q, k, v, causal, scale, softcap, key_bias)
    rest = None
    if type(causal) is bool and _calls.op_checks(scale, q, k, v, *biases):
        rest = causal, scale
    return run(
        "fmha", q, k, v, rest, check,
        skip_threshold, return_lse, return_stats, sink, biases,
    )  # fmt: skip
