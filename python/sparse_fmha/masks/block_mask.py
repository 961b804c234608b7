"""Block masks for `block_sparse_attention`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sparse_fmha.masks import block_lists, dense, flex, tensor_fields
from sparse_fmha.masks.block_builders import BlockBuilders
from sparse_fmha.masks.block_sets import BlockSets

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


class BlockMask(BlockBuilders, BlockSets):
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

    def to_flex(self) -> FlexBlockMask:
        """Converts to a mask of `torch.nn.attention.flex_attention`; its `mask_mod` reads this one.

        FlexAttention also broadcasts a mask of one batch entry or head.

        Raises:
            ValueError: there are no queries or no keys; FlexAttention does not support such masks.
        """
        return flex.to_flex(self._parts())

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

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
        """Writes a PNG: the blocks of one head, and a histogram of list lengths over all heads.

        Args:
            path: PNG file to write; the mask is copied to the host.
            batch, head: which lists to draw; 0 if one list serves all.

        Raises:
            IndexError: the mask has no such batch entry or head.
            TypeError: batch or head is no int.
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


tensor_fields.register(BlockMask, "sparse_fmha.BlockMask")
