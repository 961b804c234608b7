"""DHSA's boundary rule: where the attention to past and future neighbors differs most."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_floats, check_int, check_number, check_q_and_k, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha.attention import attention
from sparse_fmha.selection.reductions import score_sums

SMALL = 1e-6  # added to both masses of a ratio, as in the released code


@plain_ints
def dhsa_boundaries(
    ratios: Tensor, chunks: int, *, theta: float = 1.1, distance: int = 8
) -> Tensor:
    """Chooses chunk ends by their ratios, best first, each more than `distance` from the others.

    Source: the boundary rule of DHSA (Xiong et al. 2025, arXiv:2510.24606), with the defaults of
    its code, which takes one chunk or more for each 64 tokens. At inference, ratios come from a
    small network on the keys, which a model has to bring; `dhsa_ratios` is what it is trained on.

    Args:
        ratios: `[B, L]` of a floating point dtype: how much token c looks like the last of a chunk.
            Among equal ones the first is taken; NaN is not taken.
        chunks: ends to choose; fewer if fewer have a ratio above `theta`.
        distance: 0 or more tokens; non-maximum suppression.

    Returns:
        int64 `[B, chunks + 2]`, ascending: 0, one past each chosen end, and L; unused entries are
        L. Does not wait for the device: it takes `chunks` steps over `[B, L]`.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_floats("ratios", ratios, 2, "[batch, tokens]")
    check_int("chunks", chunks)
    check_int("distance", distance)
    theta = check_number("theta", theta, -1e30, 1e30)
    batch, length = ratios.shape
    found = torch.full((batch, chunks + 2), length, dtype=torch.int64, device=ratios.device)
    found[:, 0].fill_(0)
    if not length:
        return found
    left = torch.where(ratios > theta, ratios.detach(), -torch.inf).float()
    place = torch.arange(length, device=ratios.device)
    for n in range(chunks):
        best, at = left.max(-1, keepdim=True)
        found[:, n + 1 : n + 2] = torch.where(best > -torch.inf, at + 1, length)
        left = left.masked_fill((place - at).abs() <= distance, -torch.inf)
    return found.sort(-1).values


@torch.no_grad()
@plain_ints
def dhsa_ratios(q: Tensor, k: Tensor, *, window: int = 4, scale: float | None = None) -> Tensor:
    """Returns how unlike the attention to the tokens before and after each token is.

        P = causal softmax, averaged over heads,
        past(c)   = sum of P[i, j] over i >= c + window and c - window < j <= c,
        future(c) = sum of P[i, j] over i >= c + window and c < j <= c + window,
        ratio(c)  = larger / smaller of the two, each plus 1e-6; 0 within 2 windows of the ends.

    Source: as for `dhsa_boundaries`. Masses are differences of column sums of the whole map and of
    sums near its diagonal, in fp32; the map is not stored.

    Args:
        q: `[B, L, Hq, D]`, as passed to `attention`. k: `[B, L, Hkv, D]`.
        window: tokens on each side.
        scale: scale of q.k; default `D**-0.5`.

    Returns:
        fp32 `[B, L]`. No gradients. Takes one forward pass of attention and one of `score_sums`.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed, or as in `attention`.
    """
    check_q_and_k(q, k)
    check_int("window", window, 1)
    batch, length, heads, dim = q.shape
    if k.shape[1] != length:
        raise ValueError(f"k must have the {length} tokens of q, got {k.shape[1]}")
    ratios = torch.zeros(batch, length, dtype=torch.float32, device=q.device)
    inner = length - 4 * window + 1  # tokens with a ratio, from 2 * window - 1
    if inner <= 0:
        return ratios
    _, lse = attention(q, k, k, causal=True, scale=scale, return_lse=True)
    scale = dim**-0.5 if scale is None else scale
    mass = score_sums(q, k, lse=lse, causal=True, scale=scale).mean(1)  # [B, L]
    past, future = torch.zeros(2, batch, inner, dtype=torch.float32, device=q.device)
    first = 2 * window - 1
    keys = k.float().repeat_interleave(heads // k.shape[2], 2)
    with without_autocast(q.device):
        for n in range(2 * window):
            # Here mass[j] is over the queries i >= j + n: it counts for the token j + n - window.
            shift = window - n
            own = mass[:, first + shift : first + shift + inner].clamp(min=0)
            (future if shift > 0 else past).add_(own)
            near = (q[:, n:].float() * keys[:, : length - n]).sum(-1) * scale - lse[:, n:]
            mass[:, : length - n] -= near.exp().mean(-1)
    larger, smaller = torch.maximum(past, future) + SMALL, torch.minimum(past, future) + SMALL
    ratios[:, first : first + inner] = larger / smaller
    return ratios
