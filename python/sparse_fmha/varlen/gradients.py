"""The backward pass of packed sequences on CUDA: that of `block_sparse_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.masks import packed

_library = torch.library.Library("sparse_fmha", "IMPL")


def backward_over_lists(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool = False,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    softcap: float = 0.0,
) -> list[Tensor]:
    """The op `varlen_bwd` on any device that has `block_sparse_bwd`."""
    if page_table is not None:
        raise RuntimeError(
            "sparse_fmha: page_table must be None, because keys in pages have no gradient, got a "
            "tensor"
        )
    assert cu_k is not None  # checked by the forward pass
    if cu_k.data_ptr() == cu_q.data_ptr():  # autograd may have made two tensors of one
        cu_k = cu_q
    sequences = packed.sequences_of(cu_q, cu_k, seqused_k, q.shape[0], k.shape[0])
    mask = packed.block_mask(sequences, max_q, max_k, causal)
    queries, keys = packed.held_queries(sequences), packed.held_keys(sequences)
    # Tiles have tokens of no sequence, which may hold NaN.
    q, dout = (packed.only(queries, x)[None] for x in (q, dout))
    k, v = (packed.only(keys, x)[None] for x in (k, v))
    if dlse is not None:
        dlse = torch.where(queries[:, None], dlse, 0)[None]
    gradients: list[Tensor] = torch.ops.sparse_fmha.block_sparse_bwd(
        *(dout, dlse, q, k, v, out[None], lse[None], mask.counts, mask.indices),
        *(mask.partial_counts, mask.partial_indices, mask.partial_bits),
        *(mask.block_q, mask.block_kv, mask.causal, scale, None, None, need_dq, need_dkv, False),
        *(torch.are_deterministic_algorithms_enabled(), None, softcap),
    )
    needed = (need_dq, need_dkv, need_dkv)
    return [
        gradient[0] if wanted else like.new_empty((like.shape[0], 0))
        for gradient, like, wanted in zip(gradients, (q[0], k[0], v[0]), needed, strict=True)
    ]


_library.impl("varlen_bwd", backward_over_lists, "CUDA")
