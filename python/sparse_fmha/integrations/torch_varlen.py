"""The interface of `torch.nn.attention.varlen`, on this library's kernels.

from sparse_fmha.integrations.torch_varlen import varlen_attn
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparse_fmha.integrations import _packed

__all__ = ["varlen_attn"]


class AuxRequest(Protocol):
    """`torch.nn.attention.varlen.AuxRequest`, which only newer versions of torch have."""

    @property
    def lse(self) -> bool: ...


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`varlen_attention` with the signature of `torch.nn.attention.varlen.varlen_attn` (2.13).

    Differences: it also runs on the CPU, in fp32 and fp64 too; lengths in seqused_k have
    gradients; a query that sees no key has out 0 and lse -inf.

    Args:
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, seqused_k: q, k, v, cu_q, cu_k,
            max_q, max_k, scale and seqused_k of `varlen_attention`.
        return_aux: with `lse` true also return the log-sum-exp.
        window_size: (left, right): query i of Lq sees key j of Lk only if
            `-left <= j - i - (Lk - Lq) <= right`; -1: no bound. (-1, 0) is causal. Windows shrink
            at the ends of a sequence. Any other than (-1, -1) and (-1, 0) runs on
            `block_sparse_attention`.
        enable_gqa: must be True if query has more heads than key and value.
        block_table: page_table of `varlen_attention`.
        num_splits: None.

    Returns:
        The output, `[Tq, Hq, D]`; with `return_aux.lse` also lse, `[Hq, Tq]` as torch's op has it.

    Raises:
        ValueError: num_splits is given, query has more heads and enable_gqa is False, or as in
            `varlen_attention`.
        TypeError, RuntimeError, NotImplementedError: see `varlen_attention`.
    """
    if num_splits is not None:
        raise ValueError(f"num_splits must be None, got {num_splits}")
    heads, heads_kv = (x.shape[-2] if x.dim() > 1 else 0 for x in (query, key))
    if heads != heads_kv and not enable_gqa:
        raise ValueError(
            f"key must have the {heads} heads of query unless enable_gqa is True, got {heads_kv}"
        )
    out, lse = _packed.attend(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        window_size,
        scale,
        seqused_k,
        block_table,
    )
    return (out, lse.mT) if return_aux is not None and return_aux.lse else out
