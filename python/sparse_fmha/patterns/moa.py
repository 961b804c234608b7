"""MoA: a sink and a band, with a span rule for each head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from sparse_fmha._checks import check_collection, check_int, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._static import from_pattern


@plain_ints
def moa(
    q_len: int,
    kv_len: int,
    alphas: Sequence[float],
    betas: Sequence[float],
    *,
    sink: int = 64,
    min_span: int = 128,
    block: int = 64,
    block_q: int = 64,
    block_kv: int = 64,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Returns the causal mask of MoA, mixture of sparse attention.

    In a sequence of N = kv_len tokens, head h sees a span of

        S_h = alpha_h + beta_h * N, clipped to [min_span, N] and rounded up to blocks:

    the first `sink` tokens and a sliding band of `S_h - sink` tokens. In blocks, with
    `g = sink / block` and `b_h = S_h / block - g`, query block I sees the key blocks `J <= I` with
    `J < g` or `I - J < b_h`. Source: Fu et al. 2024, "MoA: Mixture of Sparse Attention for
    Automatic Large Language Model Compression", arXiv:2406.14909; blocks of 64, sink and shortest
    span as in its code. MoA finds alpha and beta by a search on calibration data.

    Args:
        q_len, kv_len: tokens; query i is at position `i + kv_len - q_len`.
        alphas, betas: one for each query head, in tokens and tokens per token.
        sink: tokens, a multiple of `block`. min_span: tokens, more than `sink`.
        block: tokens in a block of the formula, a multiple of `block_q` and `block_kv`.
        block_q, block_kv, device: block sizes and device of the mask.

    Raises:
        ValueError, TypeError: a size is not allowed, alphas and betas differ in length, or a number
            is not finite.
    """
    spans = spans_of(kv_len, alphas, betas, sink=sink, min_span=min_span, block=block)
    band = [(span - sink) // block for span in spans]
    sinks = sink // block
    columns = min(max(band), ceil_div(kv_len, block))
    bands = torch.tensor(band, dtype=torch.int64, device=device)[:, None, None]
    first = torch.arange(sinks, device=device)
    back = torch.arange(columns - 1, -1, -1, device=device)

    def make(rows: Tensor) -> tuple[Tensor, Tensor]:
        near = rows - back
        seen = (near >= sinks) & (back < bands)
        first_seen = (first <= rows).expand(len(bands), -1, -1)
        numbers = torch.cat([first.expand(len(rows), -1), near], -1)
        return numbers, torch.cat([first_seen, seen], -1)

    sizes = (q_len, kv_len, block, block_q, block_kv)
    lists = from_pattern(make, len(band), sinks + columns, *sizes, True, device)
    return BlockMask(*lists.of_mask(), q_len, kv_len, block_q, block_kv, causal=True)


def spans_of(
    kv_len: int,
    alphas: Sequence[float],
    betas: Sequence[float],
    *,
    sink: int,
    min_span: int,
    block: int,
) -> list[int]:
    """Checks the arguments of `moa`; returns the span of each head, in whole blocks."""
    check_collection("alphas", alphas)
    check_collection("betas", betas)
    check_int("kv_len", kv_len)
    check_int("block", block, 1)
    check_int("sink", sink)
    check_int("min_span", min_span, sink + 1)
    if sink % block:
        raise ValueError(f"sink must be a multiple of block = {block}, got {sink}")
    if len(alphas) != len(betas) or not len(alphas):
        raise ValueError(
            "alphas and betas must have one entry for each query head, got "
            f"{len(alphas)} and {len(betas)}"
        )
    for name, values in (("alphas", alphas), ("betas", betas)):
        for value in values:
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be numbers, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite numbers, got {value}")
    spans = (
        max(min(alpha + beta * kv_len, kv_len), min_span)
        for alpha, beta in zip(alphas, betas, strict=True)
    )
    return [math.ceil(span / block) * block for span in spans]
