"""How block masks are made: from lists, maps, token masks, documents and functions of positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists, dense, documents, flex
from sparse_fmha.masks.block_fields import BlockFields

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

Mask = TypeVar("Mask", bound="BlockBuilders")


class BlockBuilders(BlockFields):
    """The constructors of `BlockMask` by name."""

    @classmethod
    def from_blocks(
        cls: type[Mask],
        blocks: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        causal: bool = False,
        width: int | None = None,
        validate: bool = False,
    ) -> Mask:
        """Builds a mask of full blocks from a map; with `causal`, nothing above the diagonal.

        Args:
            blocks: bool `[B|1, H|1, nQ, nK]`.
            width: capacity of the lists, default nK. A row with more blocks loses its last ones.
            validate: raise ValueError if a row has more than `width`; waits for the device.
        """
        block_checks.check_sizes(q_len, kv_len, block_q, block_kv, causal)
        block_checks.check_blocks(blocks, q_len, kv_len, block_q, block_kv)
        block_checks.check_width("width", width)
        sizes = (q_len, kv_len, block_q, block_kv)
        if validate and width is not None:
            reachable = block_lists.reachable_blocks(*sizes, causal, blocks.device)
            block_checks.validate_width(blocks & reachable, width)
        ends = block_lists.reached(*sizes, True, blocks.device) if causal else None
        return cls(*block_lists.list_blocks(blocks, width, ends), *sizes, causal=causal)

    @classmethod
    def from_indices(
        cls: type[Mask],
        counts: Tensor | None,
        indices: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        causal: bool = False,
        validate: bool = False,
    ) -> Mask:
        """Builds a mask from lists of full blocks, in any order.

        Entries of -1 are padding and may be anywhere. Duplicate blocks count once.

        Args:
            counts: int32 `[B|1, H|1, nQ]`, how many slots of each list to read; None: all.
            indices: int32 `[B|1, H|1, nQ, width]`.
            validate: raise ValueError if a list has a duplicate block or one out of range (other
                than -1), or a count is not in [0, width]; waits for the device. Without it, such
                entries are dropped.
        """
        block_checks.check_sizes(q_len, kv_len, block_q, block_kv, causal)
        if counts is None:
            block_checks.check_list_tensor("indices", indices, torch.int32, axes=4)
            counts = torch.full(
                indices.shape[:3], indices.shape[3], dtype=torch.int32, device=indices.device
            )
        block_checks.check_lists("", counts, indices, q_len, block_q)
        blocks_kv = ceil_div(kv_len, block_kv)
        if validate:
            block_checks.validate_unordered(counts, indices, blocks_kv)
        sizes = (q_len, kv_len, block_q, block_kv)
        ends = block_lists.reached(*sizes, causal, indices.device)
        return cls(*block_lists.in_order(counts, indices, blocks_kv, ends), *sizes, causal=causal)

    @classmethod
    def from_dense(
        cls: type[Mask],
        visible: Tensor,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        partial_width: int | None = None,
    ) -> Mask:
        """Builds a mask with exactly the pairs of a token mask. Reads all pairs.

        Args:
            visible: bool `[q_len, kv_len]`, `[H|1, q_len, kv_len]` or `[B|1, H|1, q_len, kv_len]`.
            partial_width: capacity of the lists of partial blocks; a row with more loses its last
                ones. Default: the longest list, which waits for the device.

        Raises:
            TypeError: visible is not a bool tensor.
            ValueError: the number of dimensions or a block size is not allowed.
        """
        return cls._of(dense.from_dense(visible, block_q, block_kv, partial_width))

    @classmethod
    def from_mask_mod(
        cls: type[Mask],
        mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        batch: int,
        heads: int,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        device: torch.device | str = "cpu",
    ) -> Mask:
        """Builds a mask from a FlexAttention `mask_mod(b, h, q, kv)`; waits for the device.

        The function is evaluated for every pair, in chunks that keep memory small. Time grows with
        `q_len * kv_len`; `from_documents` and `patterns` build their masks without this cost.

        Args:
            mask_mod: maps four scalar index tensors to a bool scalar; it runs under `torch.vmap`.
            batch, heads: 1 if the function does not depend on them.

        Raises:
            TypeError: mask_mod is not callable, or does not return bool.
            ValueError: mask_mod does not return a scalar for one pair.
        """
        sizes = (q_len, kv_len, block_q, block_kv)
        return cls._of(flex.from_mask_mod(mask_mod, batch, heads, *sizes, device))

    @classmethod
    def from_documents(
        cls: type[Mask],
        cu: Tensor,
        block_q: int = 128,
        block_kv: int = 128,
        causal: bool = False,
        *,
        length: int | None = None,
        max_len: int | None = None,
        validate: bool = False,
    ) -> Mask:
        """Builds a mask for packed documents: a query sees the keys of its own document.

        No pairs of tokens are evaluated. If a query block has tokens of several documents, all its
        key blocks are partial. All lists are as wide as the longest one, so bitmasks take up to
        `T / block_q * W * block_q * block_kv / 8` bytes, where W is the largest number of key
        blocks of two neighboring documents. If documents start at multiples of `block_q`, this does
        not occur, and a query block has at most two partial blocks.

        Args:
            cu: int32 `[documents + 1]`, cumulative lengths: the start of each document, then T, the
                number of tokens. `cu[0]` is 0. Entries must not descend; equal entries are empty
                documents.
            block_q, block_kv, causal: as in `BlockMask`.
            length: T. max_len: upper bound of a document's tokens. If both are given, the mask is
                built on cu's device without waiting for it, lists are as wide as documents of
                max_len tokens can need, and the values in cu are not checked. Otherwise the host
                reads cu, which waits for its device.
            validate: always check the values in cu; waits for the device.

        Returns:
            A mask of T queries and T keys, one for all batch entries and heads, on cu's device.

        Raises:
            TypeError: cu is not an int32 tensor.
            ValueError: cu is not one-dimensional or is empty; if it is read, cu does not start at
                0, descends, or does not match length or max_len.
        """
        return cls._of(
            documents.from_documents(cu, block_q, block_kv, causal, length, max_len, validate)
        )

    @classmethod
    def from_flex(cls: type[Mask], mask: FlexBlockMask) -> Mask:
        """Converts a mask of `torch.nn.attention.flex_attention`; waits for the device.

        Its `mask_mod` is evaluated in partial blocks to fill their bitmasks. These include
        causality, so the result has `causal=False`.

        Raises:
            TypeError: mask is not a FlexAttention `BlockMask`.
            ValueError: its BLOCK_SIZE is not supported.
        """
        return cls._of(flex.from_flex(mask))
