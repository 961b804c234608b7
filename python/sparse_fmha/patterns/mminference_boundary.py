"""MMInference's boundary heads: tokens in the order of modalities, a pattern for each pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_fmha._checks import check_flag, check_instance, check_int, check_q_and_k, plain_ints
from sparse_fmha.masks import block_checks, block_lists, tensor_fields
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.tensor_fields import TensorFields
from sparse_fmha.patterns.regions import RegionOrder
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_blocks

# What a query of one modality sees of another: "dense", "none", ("top_k", blocks) or
# ("a_shape", first blocks, last blocks).
Pattern = str | tuple[str, int] | tuple[str, int, int]


class ModalityOrder(TensorFields):
    """Queries, and keys if asked for, in the order of modalities, each padded to whole blocks.

    Tokens keep their order within a modality, and masks made with `mask` compare original
    positions, so attention is causal as before. `to`, saving and use as a pytree node work as for
    `BlockMask`.

    Attributes:
        queries, keys: `RegionOrder` of both; that of keys has one region if they keep their order.
        full: bool `[nQ, nK]`, blocks of the new order in which every query may see every key.
        partial: bool `[nQ, nK]`, other blocks with a pair that causality allows.
        width: the most partial blocks of a row.

    Args:
        modality: integers `[L]`, the modality of each token, from 0. Read by the host.
        keys_too: also order keys: MMInference's 2-D boundary. False: its Q-boundary, where keys
            keep their order.
        block_q, block_kv: block sizes of masks.
        device: device of the tensors; default that of `modality`.

    Raises:
        ValueError, TypeError: modality is not a tensor of integers `[L]`, or a size is not allowed.
    """

    TENSORS = ("queries", "keys", "full", "partial")
    PLAIN = ("width",)

    @plain_ints
    def __init__(
        self,
        modality: Tensor,
        *,
        keys_too: bool = True,
        block_q: int = 64,
        block_kv: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        check_flag("keys_too", keys_too)
        block_checks.check_sizes(0, 0, block_q, block_kv, False)
        self.queries = RegionOrder(modality, block_q, device=device)
        of_keys = modality if keys_too else torch.zeros_like(modality)
        self.keys = RegionOrder(of_keys, block_kv, device=device)
        first_q, last_q = _ends(self.queries)
        first_k, last_k = _ends(self.keys)
        whole = self.keys.present.all(-1)
        self.full = (last_k <= first_q[:, None]) & whole
        self.partial = (first_k <= last_q[:, None]) & ~self.full
        self.width = int(self.partial.sum(-1).max())

    def permute(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Brings q, k and v `[B, L, ...]` into the new order, with padding."""
        return self.queries.permute(q), self.keys.permute(k), self.keys.permute(v)

    def undo(self, out: Tensor) -> Tensor:
        """Brings the output of attention into the old order, without padding."""
        return self.queries.undo(out)

    def mask(self, blocks: Tensor) -> BlockMask:
        """Returns the causal mask of the blocks that are set, bool `[B|1, H|1, nQ, nK]`.

        Its `causal` is False: bitmasks hold what causality leaves of blocks that it cuts.
        """
        queries, keys = self.queries, self.keys
        sizes = queries.length, keys.length, queries.block, keys.block
        block_checks.check_blocks(blocks, *sizes)
        counts, indices = block_lists.list_blocks(blocks & self.full)
        partial_counts, partial = block_lists.list_blocks(blocks & self.partial, self.width)
        at = torch.where(queries.present, queries.sources, -1)  # padding sees nothing
        of_keys = torch.where(keys.present, keys.sources, queries.tokens)  # and is not seen
        # Keys ascend in a block, so each query sees the first few of them.
        lead = (*partial.shape, queries.block)
        ordered = of_keys[partial.clamp(min=0).long()]
        ends = torch.searchsorted(ordered, at[:, None].expand(lead).contiguous(), right=True)
        return BlockMask(
            counts,
            indices,
            *sizes,
            partial_counts=partial_counts,
            partial_indices=partial,
            partial_bits=block_lists.interval_bits(torch.zeros_like(ends), ends, keys.block),
        )


tensor_fields.register(ModalityOrder, "sparse_fmha.patterns.ModalityOrder")


@plain_ints
def mminference_boundary(
    q: Tensor,
    k: Tensor,
    order: ModalityOrder,
    pairs: Mapping[tuple[int, int], Pattern],
    *,
    other: Pattern = "dense",
) -> BlockMask:
    """Returns the mask of a head with modality boundaries, in the order of modalities.

        queries of modality a see keys of modality b by the pattern of the pair (a, b), and never a
        later key in the original order.

    Source: Li et al. 2025, "MMInference", arXiv:2504.16083: with `ModalityOrder(keys_too=True)` its
    2-D boundary heads, otherwise its Q-boundary heads, where b is always 0. Patterns are, in blocks
    of the new order: ("top_k", n), the n blocks with the largest products of block means;
    ("a_shape", m, n), the first m blocks of b and the n last ones that a block may see; "dense";
    "none". Vertical-slash within a pair, which the paper also searches, is not offered. There,
    kernels permute by address; here, `ModalityOrder.permute` copies.

        order = ModalityOrder(modality)
        mask = mminference_boundary(q, k, order, {(0, 0): "dense", (1, 1): ("top_k", 20)})
        out = order.undo(block_sparse_attention(*order.permute(q, k, v), mask))

    Args:
        q: `[B, L, Hq, D]`, as passed to attention, in the original order. k: `[B, L, Hkv, D]`.
        order: of L tokens, on q's device.
        pairs: patterns by modality of queries and of keys.
        other: the pattern of pairs that are not there.

    Returns:
        A mask for `order.permute(q, k, v)`, with lists for each batch entry and query head, built
        without waiting for the device. All `nQ * nK` scores of blocks are in memory at once.

    Raises:
        ValueError, TypeError: a shape, dtype, modality or pattern is not allowed.
    """
    check_instance("pairs", pairs, Mapping)
    check_instance("order", order, ModalityOrder)
    check_q_and_k(q, k)
    queries, keys = order.queries, order.keys
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[1] != queries.tokens:
            raise ValueError(
                f"{name} must have the {queries.tokens} tokens of order, got {tensor.shape[1]}"
            )
        if tensor.device != queries.slots.device:
            raise ValueError(
                f"{name} must be on order's device, {queries.slots.device}, got {tensor.device}"
            )
    for pair in pairs:
        if not (0 <= pair[0] < queries.regions and 0 <= pair[1] < keys.regions):
            raise ValueError(
                f"pairs must have modalities of queries below {queries.regions} and of keys below "
                f"{keys.regions}, got {pair}"
            )
    for pattern in (other, *pairs.values()):
        _check_pattern(pattern)
    reachable = order.full | order.partial
    means = [_block_means(x, own) for x, own in ((q, queries), (k, keys))]
    scores = pooled_scores(*means, allowed=reachable)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for a in range(queries.regions):
        for b in range(keys.regions):
            pattern = pairs.get((a, b), other)
            own = (queries.block_region == a)[:, None] & (keys.block_region == b) & reachable
            chosen |= _blocks(pattern, own, scores)
    return order.mask(chosen)


def _blocks(pattern: Pattern, own: Tensor, scores: Tensor) -> Tensor:
    """Returns the blocks of a pattern among `own`, bool `[nQ, nK]`, for scores `[.., nQ, nK]`."""
    if isinstance(pattern, str):
        return own if pattern == "dense" else torch.zeros_like(own)
    name, n, *more = pattern
    if name == "top_k":
        return top_k_blocks(scores.masked_fill(~own, -torch.inf), n)
    rank = own.cumsum(-1)
    return own & ((rank <= n) | (rank > rank[:, -1:] - more[0]))


def _block_means(x: Tensor, order: RegionOrder) -> Tensor:
    """Returns means of the tokens of each block of the new order, fp32 `[B, blocks, H, D]`."""
    present = order.present.sum(-1).clamp(min=1)
    means = pool_blocks(order.permute(x.detach()), order.block)
    return means * (order.block / present)[:, None, None]


def _ends(order: RegionOrder) -> tuple[Tensor, Tensor]:
    """Returns the original positions of the first and the last token of each block."""
    last = order.present.sum(-1, keepdim=True) - 1
    return order.sources[:, 0], order.sources.gather(-1, last)[:, 0]


def _check_pattern(pattern: Pattern) -> None:
    sizes = {"top_k": 1, "a_shape": 2}
    if pattern in ("dense", "none"):
        return
    if isinstance(pattern, str) or len(pattern) != 1 + sizes.get(pattern[0], -1):
        raise ValueError(
            "patterns of pairs and other must be 'dense', 'none', ('top_k', blocks) or ('a_shape', "
            f"first blocks, last blocks), got {pattern!r}"
        )
    for value in pattern[1:]:
        check_int(f"a number of {pattern!r}", value)
