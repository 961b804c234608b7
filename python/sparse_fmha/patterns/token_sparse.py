"""Token Sparse Attention: each head drops tokens, queries and keys alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from sparse_fmha import _checks
from sparse_fmha._checks import (
    check_int,
    check_number,
    check_q_and_k,
    check_qkv_of_one_dim,
    plain_ints,
)
from sparse_fmha.attention import attention
from sparse_fmha.attention.row_copies import put_rows, take_rows
from sparse_fmha.selection import top_k_indices
from sparse_fmha.selection.reductions import score_sums

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def token_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    indices: Tensor | None = None,
    attend: Attend | None = None,
    scale: float | None = None,
) -> Tensor:
    """Computes causal attention among the tokens that each query head keeps.

        head h attends on q, k, v at its kept tokens, in their order, as if no others were there;
        the output of a dropped token is 0: the layer's residual connection carries it on.

    Source: Jo et al. 2026, "Token Sparse Attention: Efficient Long-Context Inference with
    Interleaved Token Selection", arXiv:2602.03216. Order is kept, so plain causal attention among
    kept tokens is exact. The cache of keys and values is not touched. Published for half of the
    layers, those whose hidden states change least (15 to 30 of Llama-3.1-8B).

    Args:
        q: `[B, L, Hq, D]`. k, v: `[B, L, Hkv, D]`, as in `attention`.
        indices: int64 `[B, Hq, n]`, from `token_sparse_indices`, which is called if None. They must
            ascend and not repeat, which is not checked.
        attend: what computes attention of q, k and v `[B, n, Hq, D]`, for a second sparse method
            among the kept tokens. Default: causal `attention`. k and v have Hq heads, or Hkv if no
            token is dropped.
        scale: scale of q.k, of the selection and of the default `attend`; default `D**-0.5`.

    Returns:
        `[B, L, Hq, D]` in q's dtype, differentiable in q, k and v. Besides it, memory holds the
        gathered tensors: n / L of q three times.

    Raises:
        ValueError, TypeError: a shape or dtype is not allowed, or `attend` changed the shape.
    """
    check_qkv_of_one_dim(q, k, v, axes=(1,))
    scale = _checks.finite("scale", scale)
    if indices is None:
        indices = token_sparse_indices(q, k, scale=scale)
    _check_indices(indices, q, k)
    if attend is None:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True, scale=scale)

    if indices.shape[2] == q.shape[1]:
        return attend(q, k, v)
    kept = [take_rows(x, indices) for x in (q, k, v)]
    out = attend(*kept)
    if out.shape != kept[0].shape:
        raise ValueError(f"attend must return shape {list(kept[0].shape)}, got {list(out.shape)}")
    return put_rows(out, indices, q.shape[1], 0)


@plain_ints
def token_sparse_indices(
    q: Tensor,
    k: Tensor,
    *,
    tau: float = 0.005,
    min_tokens: int = 1024,
    window: int = 128,
    pool: int = 7,
    keep: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Chooses the tokens that each query head keeps.

        c[h, j] = mean over the last `window` queries of the softmax at key j, j before the window,
        s[h]    = c[h] averaged over `pool` neighbors, zeros beyond the ends;
        dropped = how many of the smallest of sum over h of s[h], as shares of their total, add up
                  to less than tau, and one more if there are any;
        head h keeps the `max(min_tokens, L - window - dropped)` tokens with the largest s[h, j] and
        the window.

    Source and defaults: Jo et al. 2026, arXiv:2602.03216, and its released code (tau 0.005 for
    Llama-3.1-8B, 0.008 for Mistral-Nemo; both for the layers that are sparse). The number is one
    for all heads of a layer. For several batch entries, which the code does not have, it is that of
    the entry that keeps most. Ties take the first token.

    Args:
        q: `[B, L, Hq, D]`, as passed to attention. k: `[B, L, Hkv, D]`.
        tau: share of the scores that may be dropped, 0 to 1; 0 drops nothing.
        min_tokens, window: see above; with `min_tokens + window` tokens or fewer, all are kept.
        pool: odd.
        keep: how many tokens to keep before the window instead of what tau gives.
        scale: scale of q.k; default `D**-0.5`.

    Returns:
        int64 `[B, Hq, n]`, ascending. Waits for the device once to learn n, unless `keep` is given.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    tau = check_number("tau", tau, 0, 1)
    check_int("min_tokens", min_tokens)
    check_int("window", window, 1)
    if check_int("pool", pool, 1) % 2 == 0:
        raise ValueError(f"pool must be odd, got {pool}")
    batch, length, heads, _ = q.shape
    if k.shape[1] != length:
        raise ValueError(f"k must have the {length} tokens of q, got {k.shape[1]}")
    before = max(0, length - window)
    if keep is not None:
        keep = min(check_int("keep", keep), before)
    elif length <= min_tokens + window or tau == 0:
        keep = before
    recent = torch.arange(before, length, device=q.device).expand(batch, heads, -1)
    if keep == before:
        return torch.arange(length, device=q.device).expand(batch, heads, -1)
    sums = score_sums(q, k, rows=window, causal=True, scale=scale)[..., :before] / window
    scores = avg_pool1d(sums, pool, stride=1, padding=pool // 2)
    if keep is None:
        keep = max(min_tokens, before - _dropped(scores.sum(1), tau))
    _, chosen = top_k_indices(scores, keep)
    return torch.cat([chosen.long(), recent], -1)


def _dropped(scores: Tensor, tau: float) -> int:
    """Returns how many tokens to drop of scores `[B, n]`: the least of any batch entry."""
    shares = (scores / (scores.sum(-1, keepdim=True) + 1e-8)).sort(-1).values
    few = (shares.double().cumsum(-1) < tau).sum(-1)
    return int(torch.where(few > 0, few + 1, 0).min()) if len(few) else 0


def _check_indices(indices: Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        kind = getattr(indices, "dtype", type(indices))
        raise TypeError(f"indices must be an int64 tensor, got {kind}")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have the {q.shape[1]} tokens of q, got {k.shape[1]}")
    lead = (q.shape[0], q.shape[2])
    if indices.dim() != 3 or indices.shape[:2] != lead or indices.shape[2] > q.shape[1]:
        raise ValueError(
            f"indices must have shape [{lead[0]}, {lead[1]}, n], n at most {q.shape[1]}, got "
            f"{list(indices.shape)}"
        )
    if indices.device != q.device:
        raise ValueError(f"indices must be on q's device, {q.device}, got {indices.device}")
