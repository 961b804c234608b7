"""Block masks for `block_sparse_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import (
    block_checks,
    block_lists,
    dense,
    documents,
    flex,
    intersection,
    tensor_fields,
    union,
)
from sparse_fmha.masks.parts import BlockParts
from sparse_fmha.masks.tensor_fields import TensorFields

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

TENSORS = ("counts", "indices", "partial_counts", "partial_indices", "partial_bits")
PLAIN = ("q_len", "kv_len", "block_q", "block_kv", "causal")
FIELDS = (*TENSORS, *PLAIN)  # also the fields of BlockParts


class BlockMask(TensorFields):
    """Lists, for each query block, the key blocks that it sees.

    Query rows are divided into blocks of `block_q`, keys into blocks of `block_kv`; the last block
    may be shorter. nQ and nK are the numbers of blocks. Each (batch entry or all, query head or
    all, query block) has a list of full key blocks, in which it sees every key, and a list of
    partial key blocks, each with a bitmask. `causal` applies on top: query i sees key j only if
    `j <= i + kv_len - q_len`.

    Attributes:
        counts: int32 `[B|1, H|1, nQ]`, the lengths of the lists of full blocks.
        indices: int32 `[B|1, H|1, nQ, width]`, these lists; entries past a count are ignored.
        partial_counts, partial_indices: the same for partial blocks, or None.
        partial_bits: uint8 `[B|1, H|1, nQ, partial width, block_q, block_kv / 8]` or None: column c
            of a row is bit `c % 8` of byte `c // 8`.
        q_len, kv_len: tokens. block_q: 64 or 128. block_kv: 16, 32, 64 or 128. causal: bool.

    `to` moves a mask, `torch.save` and `torch.load(weights_only=True)` support it, and it is a
    pytree node: an input of `torch.export` and of compiled and checkpointed functions. A module
    does not move a mask that it keeps as a plain attribute: call `mask.to(q.device)` where the mask
    is used. It returns the mask itself if the device is the same.

    Unless a constructor says otherwise, building a mask from device tensors does not wait for the
    device, and shapes do not depend on data: scores, lists and attention fit in one CUDA graph.

    Args:
        counts, indices, q_len, kv_len, block_q, block_kv: see Attributes.
        partial_counts, partial_indices, partial_bits, causal: see Attributes. Tensors are kept, not
            copied.
        validate: also call `validate()`, which waits for the device.

    Raises:
        TypeError: a dtype or type is not allowed.
        ValueError: shapes do not match, a block size is not allowed, tensors are on different
            devices, or only some partial tensors are given; with `validate`, lists are invalid.
    """

    TENSORS = TENSORS
    PLAIN = PLAIN

    def __init__(
        self,
        counts: Tensor,
        indices: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        partial_counts: Tensor | None = None,
        partial_indices: Tensor | None = None,
        partial_bits: Tensor | None = None,
        causal: bool = False,
        validate: bool = False,
    ) -> None:
        block_checks.check_sizes(q_len, kv_len, block_q, block_kv, causal)
        self.q_len, self.kv_len = _checks.as_int(q_len), _checks.as_int(kv_len)
        self.block_q, self.block_kv = int(block_q), int(block_kv)
        self.causal = causal
        self.counts, self.indices = counts, indices
        self.partial_counts, self.partial_indices = partial_counts, partial_indices
        self.partial_bits = partial_bits
        block_checks.check_tensors(self._parts())
        for name in TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.contiguous())
        if validate:
            self.validate()

    @property
    def blocks_q(self) -> int:
        """nQ."""
        return ceil_div(self.q_len, self.block_q)

    @property
    def blocks_kv(self) -> int:
        """nK."""
        return ceil_div(self.kv_len, self.block_kv)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch entries or 1, query heads or 1, q_len, kv_len."""
        return (*self.counts.shape[:2], self.q_len, self.kv_len)

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @staticmethod
    def from_blocks(
        blocks: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        causal: bool = False,
        width: int | None = None,
        validate: bool = False,
    ) -> BlockMask:
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
        return BlockMask(*block_lists.list_blocks(blocks, width, ends), *sizes, causal=causal)

    @staticmethod
    def from_indices(
        counts: Tensor | None,
        indices: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        causal: bool = False,
        validate: bool = False,
    ) -> BlockMask:
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
        return BlockMask(
            *block_lists.in_order(counts, indices, blocks_kv, ends), *sizes, causal=causal
        )

    @staticmethod
    def from_dense(
        visible: Tensor,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        partial_width: int | None = None,
    ) -> BlockMask:
        """Builds a mask with exactly the pairs of a token mask. Reads all pairs.

        Args:
            visible: bool `[q_len, kv_len]`, `[H|1, q_len, kv_len]` or `[B|1, H|1, q_len, kv_len]`.
            partial_width: capacity of the lists of partial blocks; a row with more loses its last
                ones. Default: the longest list, which waits for the device.

        Raises:
            TypeError: visible is not a bool tensor.
            ValueError: the number of dimensions or a block size is not allowed.
        """
        return _mask_of(dense.from_dense(visible, block_q, block_kv, partial_width))

    @staticmethod
    def from_mask_mod(
        mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        batch: int,
        heads: int,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
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
        return _mask_of(flex.from_mask_mod(mask_mod, batch, heads, *sizes, device))

    @staticmethod
    def from_documents(
        cu: Tensor,
        block_q: int = 128,
        block_kv: int = 128,
        causal: bool = False,
        *,
        length: int | None = None,
        max_len: int | None = None,
        validate: bool = False,
    ) -> BlockMask:
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
        return _mask_of(
            documents.from_documents(cu, block_q, block_kv, causal, length, max_len, validate)
        )

    @staticmethod
    def from_flex(mask: FlexBlockMask) -> BlockMask:
        """Converts a mask of `torch.nn.attention.flex_attention`; waits for the device.

        Its `mask_mod` is evaluated in partial blocks to fill their bitmasks. These include
        causality, so the result has `causal=False`.

        Raises:
            TypeError: mask is not a FlexAttention `BlockMask`.
            ValueError: its BLOCK_SIZE is not supported.
        """
        return _mask_of(flex.from_flex(mask))

    def to_flex(self) -> FlexBlockMask:
        """Converts to a mask of `torch.nn.attention.flex_attention`; its `mask_mod` reads this one.

        FlexAttention also broadcasts a mask of one batch entry or head.

        Raises:
            ValueError: there are no queries or no keys; FlexAttention does not support such masks.
        """
        return flex.to_flex(self._parts())

    @staticmethod
    def union(*masks: BlockMask) -> BlockMask:
        """Returns the pairs visible in any mask, like `a | b`; adds forced blocks to a mask.

        A block that is full in one mask is full; the bitmasks of blocks that are partial in several
        are combined. Batch entries and heads broadcast from 1. The lists have room for those of all
        masks.

        Raises:
            TypeError: one of them is not a BlockMask.
            ValueError: no masks are given, or they differ in lengths, block sizes, causal or
                device.
        """
        return _mask_of(union.union(_parts_of(masks)))

    @staticmethod
    def intersection(*masks: BlockMask) -> BlockMask:
        """Returns the pairs visible in all masks, like `a & b`: e.g. documents and a window.

        A block that is full in all masks is full; the bitmasks of blocks that are partial in some
        are intersected. Batch entries and heads broadcast from 1. Does not wait for the device.

        Returns:
            A mask that is causal if one of them is.

        Raises:
            TypeError: one of them is not a BlockMask.
            ValueError: no masks are given, or they differ in lengths, block sizes or device.
        """
        return _mask_of(intersection.intersection(_parts_of(masks)))

    def __or__(self, other: BlockMask) -> BlockMask:
        """See `union`."""
        return BlockMask.union(self, other) if isinstance(other, BlockMask) else NotImplemented

    def __and__(self, other: BlockMask) -> BlockMask:
        """See `intersection`."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return BlockMask.intersection(self, other)

    def blocks(self) -> Tensor:
        """Returns bool `[B|1, H|1, nQ, nK]`: the listed blocks, full or partial."""
        listed = block_lists.block_map(self.counts, self.indices, self.blocks_kv)
        if self.partial_counts is None or self.partial_indices is None:
            return listed
        partial = block_lists.block_map(self.partial_counts, self.partial_indices, self.blocks_kv)
        return listed | partial

    def to_dense(self) -> Tensor:
        """Returns the visible pairs, bool `[B|1, H|1, q_len, kv_len]`."""
        return dense.to_dense(self._parts())

    @property
    def density(self) -> float:
        """Visible pairs over all pairs; 0 without tokens. Waits for the device."""
        pairs = self.q_len * self.kv_len
        lists = self.counts.shape[0] * self.counts.shape[1]
        return self.visible_pairs() / (pairs * lists) if pairs * lists else 0.0

    @property
    def block_density(self) -> float:
        """Listed blocks over all blocks; 0 without tokens. Waits for the device."""
        blocks = self.blocks()
        return blocks.sum().item() / blocks.numel() if blocks.numel() else 0.0

    @property
    def reachable_block_density(self) -> float:
        """Listed blocks over blocks with a pair that `causal` allows; 0 if there are none.

        Equals `block_density` without `causal`. Waits for the device.
        """
        sizes = (self.q_len, self.kv_len, self.block_q, self.block_kv)
        reachable = block_lists.reachable_blocks(*sizes, self.causal, self.device)
        blocks = self.blocks()
        most = int(reachable.sum()) * blocks.shape[0] * blocks.shape[1]
        return int((blocks & reachable).sum()) / most if most else 0.0

    def visible_pairs(self) -> int:
        """Returns the number of visible pairs, summed over all lists. Waits for the device."""
        return dense.visible_pairs(self._parts())

    def validate(self) -> None:
        """Checks the values in the lists; waits for the device.

        Raises:
            ValueError: a count is not in [0, width], a block is out of range, a list does not
                ascend or has a duplicate, or a block is both full and partial; the message names
                the first place.
        """
        block_checks.validate(self._parts())

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
        """Writes a PNG: the blocks of one head, and a histogram of list lengths over all heads.

        Args:
            path: PNG file to write; the mask is copied to the host.
            batch, head: which lists to draw; 0 if one list serves all.

        Raises:
            IndexError: the mask has no such batch entry or head.
            ValueError: path does not end in .png.
            ImportError: matplotlib is not installed.
        """
        from sparse_fmha.plotting.blocks import Words, draw

        full = block_lists.block_map(self.counts, self.indices, self.blocks_kv)
        listed = self.blocks()
        words = Words(
            f"BlockMask: {self.q_len} queries, {self.kv_len} keys"
            f"{', causal' if self.causal else ''}",
            f"key block ({self.block_kv} tokens)",
            f"query block ({self.block_q} tokens)",
            "key blocks",
            "query blocks",
            ("not listed", "full", "partial"),
        )
        sizes = (self.q_len, self.kv_len, self.block_q, self.block_kv)
        reachable = block_lists.reachable_blocks(*sizes, True, self.device) if self.causal else None
        draw(
            path,
            (batch, head),
            listed.int() + (listed & ~full).int(),
            words,
            None if reachable is None else int(reachable.sum()),
        )

    def __repr__(self) -> str:
        """Returns sizes and density; waits for the device, like printing a tensor."""
        if unfit := self._repr_of_unfit():
            return unfit
        batch, heads, *_ = self.shape
        listed = ""
        if tensor_fields.has_values(self.counts):
            listed = f"{self.block_density:.1%} of blocks listed, "
            if self.causal:
                reachable = f"{self.reachable_block_density:.1%} of those that causality leaves"
                listed = f"{listed[:-2]} ({reachable}), "
        partial = "" if self.partial_counts is None else "with partial blocks, "
        return (
            f"BlockMask(q_len={self.q_len}, kv_len={self.kv_len}, "
            f"blocks of {self.block_q}x{self.block_kv}, lists for {batch}x{heads} (batch x heads), "
            f"{listed}{partial}{'causal, ' if self.causal else ''}{self.device})"
        )

    def _parts(self) -> BlockParts:
        return BlockParts(**{name: getattr(self, name) for name in FIELDS})

    def _check_fields(self) -> None:
        block_checks.check_sizes(self.q_len, self.kv_len, self.block_q, self.block_kv, self.causal)
        block_checks.check_tensors(self._parts())


tensor_fields.register(BlockMask, "sparse_fmha.BlockMask")


def _parts_of(masks: Sequence[BlockMask]) -> list[BlockParts]:
    for mask in masks:
        if not isinstance(mask, BlockMask):
            raise TypeError(f"masks have a {type(mask).__name__} among them; BlockMask is needed")
    return [mask._parts() for mask in masks]


def _mask_of(parts: BlockParts) -> BlockMask:
    return BlockMask(**{name: getattr(parts, name) for name in FIELDS})
