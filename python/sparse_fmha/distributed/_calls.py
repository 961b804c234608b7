"""The ops' calls for one piece of the keys, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_fmha._ops import errors
from sparse_fmha.distributed import _attend
from sparse_fmha.distributed._steps import Piece
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask


class Added(NamedTuple):
    """What is added to the scores of a piece.

    Attributes:
        key_bias: `[B or 1, H or 1, keys]`.
        row_threshold: `[B or 1, H or 1, queries]`, only with lists.
        skip_threshold: `[B]`, forward only.
    """

    key_bias: Tensor | None = None
    row_threshold: Tensor | None = None
    skip_threshold: Tensor | None = None


def forward(
    piece: Piece, q: Tensor, k: Tensor, v: Tensor, added: Added, scale: float | None
) -> tuple[Tensor, Tensor]:
    """out and lse of a piece's queries over its keys."""
    options: dict[str, Any] = {"scale": scale, "return_lse": True, "key_bias": added.key_bias}
    if piece.mask is None:
        options["causal"] = piece.causal
    else:
        options["row_threshold"] = added.row_threshold
    if added.skip_threshold is not None:
        options["skip_threshold"] = added.skip_threshold
    out, lse = _attend.attend(None, q, k, v, piece.mask, **options)
    return out, lse


def backward(
    piece: Piece,
    of_rows: Sequence[Tensor | None],
    of_keys: Sequence[Tensor],
    added: Added,
    scale: float | None,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """A piece's part of dq, dk, dv, and with a bias of its gradient `[B, Hq, keys]`.

    out and lse are those over all keys: a probability is exp(score - lse) in whichever piece its
    key is, so nothing of the piece's own forward pass is needed.

    Args:
        of_rows: dout, dlse or None, q, out and lse of the piece's queries.
        of_keys: k and v of the piece's keys.
        needs: whether dq, whether dk and dv, and whether that of the bias is needed.
    """
    dout, dlse, q, out, lse = of_rows
    tensors = dout, dlse, q, *of_keys, out, lse
    ops, mask, (bias, threshold, _) = torch.ops.sparse_fmha, piece.mask, added
    flags = *needs, torch.are_deterministic_algorithms_enabled()
    try:
        if isinstance(mask, BlockMask):
            return ops.block_sparse_bwd(  # type: ignore[no-any-return]
                *tensors, mask.counts, mask.indices, mask.partial_counts, mask.partial_indices,
                mask.partial_bits, mask.block_q, mask.block_kv, mask.causal, scale, bias, threshold,
                *flags,
            )  # fmt: skip
        if isinstance(mask, StripeMask):
            return ops.stripe_bwd(  # type: ignore[no-any-return]
                *tensors, mask.columns, mask.counts, mask.range_starts, mask.range_counts,
                mask.block_q, mask.range_size, mask.causal, scale, bias, threshold, *flags,
            )  # fmt: skip
        return ops.fmha_bwd(  # type: ignore[no-any-return]
            *tensors, piece.causal, scale, bias, *flags
        )
    except RuntimeError as error:
        raise errors.typed(error) from None
