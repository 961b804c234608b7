"""The ops' calls for one piece of the keys, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_fmha._ops import errors
from sparse_fmha.distributed import _attend
from sparse_fmha.distributed._steps import Piece
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask


def forward(
    piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """out and lse of a piece's queries over its keys."""
    options: dict[str, Any] = {"scale": scale, "return_lse": True}
    if piece.mask is None:
        options["causal"] = piece.causal
    out, lse = _attend.attend(None, q, k, v, piece.mask, **options)
    return out, lse


def backward(
    piece: Piece,
    of_rows: Sequence[Tensor | None],
    of_keys: Sequence[Tensor],
    scale: float | None,
    needs: tuple[bool, bool],
) -> list[Tensor]:
    """A piece's part of dq, dk and dv.

    out and lse are those over all keys: a probability is exp(score - lse) in whichever piece its
    key is, so nothing of the piece's own forward pass is needed.

    Args:
        of_rows: dout, dlse or None, q, out and lse of the piece's queries.
        of_keys: k and v of the piece's keys.
        needs: whether dq, and whether dk and dv are needed.
    """
    dout, dlse, q, out, lse = of_rows
    tensors = dout, dlse, q, *of_keys, out, lse
    ops, none, mask = torch.ops.sparse_fmha, None, piece.mask
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        if isinstance(mask, BlockMask):
            return ops.block_sparse_bwd(  # type: ignore[no-any-return]
                *tensors, mask.counts, mask.indices, mask.partial_counts, mask.partial_indices,
                mask.partial_bits, mask.block_q, mask.block_kv, mask.causal, scale, none, none,
                *needs, False, deterministic,
            )  # fmt: skip
        if isinstance(mask, StripeMask):
            return ops.stripe_bwd(  # type: ignore[no-any-return]
                *tensors, mask.columns, mask.counts, mask.range_starts, mask.range_counts,
                mask.block_q, mask.range_size, mask.causal, scale, none, none, *needs, False,
                deterministic,
            )  # fmt: skip
        return ops.fmha_bwd(  # type: ignore[no-any-return]
            *tensors, piece.causal, scale, none, *needs, False, deterministic
        )
    except RuntimeError as error:
        raise errors.typed(error) from None
