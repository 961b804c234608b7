"""The interface of the package flash_attn to packed sequences, on this library's kernels.

from sparse_fmha.integrations.flash_attn import flash_attn_varlen_func
"""

from __future__ import annotations

from torch import Tensor

from sparse_fmha.integrations import _packed

__all__ = ["flash_attn_varlen_func"]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`varlen_attention` with the signature of `flash_attn.flash_attn_varlen_func` (version 2).

    Differences: it also runs on the CPU, in fp32 and fp64 too; lse has a gradient; a query that
    sees no key has lse -inf, not inf.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal: q,
            k, v, cu_q, cu_k, max_q, max_k, scale and causal of `varlen_attention`.
        window_size: (left, right): query i of Lq sees key j of Lk only if
            `-left <= j - i - (Lk - Lq) <= right`; -1: no bound. With causal, right is 0. Windows
            shrink at the ends of a sequence. With a bound other than causality,
            `block_sparse_attention` runs, which takes no block_table.
        deterministic: without effect; results are deterministic.
        return_attn_probs: also return lse and an empty tensor, as flash_attn does without dropout.
        block_table: page_table of `varlen_attention`; on the CPU only.
        dropout_p: 0. softcap: 0. alibi_slopes: None.

    Returns:
        The output, `[Tq, Hq, D]`; with `return_attn_probs` also lse, `[Hq, Tq]`, and an empty
        tensor.

    Raises:
        ValueError: dropout_p, softcap or alibi_slopes is given, or as in `varlen_attention`.
        TypeError, RuntimeError, NotImplementedError: see `varlen_attention`.
    """
    for name, value in (("dropout_p", dropout_p), ("softcap", softcap)):
        if value:
            raise ValueError(f"{name} must be 0, got {value}")
    if alibi_slopes is not None:
        raise ValueError(f"alibi_slopes must be None, got {type(alibi_slopes).__name__}")
    if causal:
        window_size = (window_size[0], 0)
    out, lse = _packed.attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        window_size,
        softmax_scale,
        page_table=block_table,
    )
    return (out, lse.mT, q.new_empty(0)) if return_attn_probs else out
