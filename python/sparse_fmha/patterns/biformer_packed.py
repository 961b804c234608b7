"""BiFormer's small regions, several to a block: their lists from products of small tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from sparse_fmha._checks import check_flag, check_instance, check_int, check_q_and_k, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha.masks import block_checks, block_lists, tensor_fields
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.tensor_fields import TensorFields
from sparse_fmha.patterns.regions import RegionOrder
from sparse_fmha.selection import pooled_scores, top_k_blocks
from sparse_fmha.selection.products import fp32_product

WORD = 16  # keys; a sum of 16 distinct powers of two is exact in fp32


class BiFormerPacking(TensorFields):
    """Order of tokens by region without padding, and which regions are in which block.

    `to`, saving and use as a pytree node work as for `BlockMask`.

    Attributes:
        order: `RegionOrder` of blocks of 1, whose `permute` and `undo` are for q, k, v and out.
        block_q, block_kv: block sizes of the mask.
        width: the most key blocks that a region has.
        regions_of_block: the most regions that a block of queries has.
        has_empty: whether some region is empty.
        members: bool `[regions, tokens]`, the tokens of each region, in the image's order.
        divisors: fp32 `[regions, 1, 1]`, their number, at least 1.
        rows: fp32 `[nQ, regions]`, the queries of each block in each region.
        words: fp32 `[regions, nK * block_kv / 16]`: of 16 keys, bit n is set if key n is in the
            region. The first is the lowest.
        row_region: int64 `[nQ, block_q]`, the region of each query.

    Args:
        region: integers `[tokens]`, any partition, e.g. from `image_regions`. Read by the host.
        regions: number of regions; default `region.max() + 1`.
        block_q, block_kv: block sizes of the mask.
        device: device of the tensors; default that of `region`.

    Raises:
        ValueError, TypeError: as for `RegionOrder`; a block size is not allowed.
    """

    TENSORS = ("order", "members", "divisors", "rows", "words", "row_region")
    PLAIN = ("block_q", "block_kv", "width", "regions_of_block", "has_empty")

    @plain_ints
    def __init__(
        self,
        region: Tensor,
        *,
        regions: int | None = None,
        block_q: int = 64,
        block_kv: int = 16,
        device: torch.device | str | None = None,
    ) -> None:
        order = RegionOrder(region, 1, regions=regions, device="cpu")
        device = region.device if device is None else torch.device(device)
        block_checks.check_sizes(order.tokens, order.tokens, block_q, block_kv, False)
        self.block_q, self.block_kv = block_q, block_kv
        member = one_hot(order.block_region, order.regions).bool()  # [tokens, regions]
        of_rows, of_keys = (
            pad(member, (0, 0, 0, -order.tokens % size)).unflatten(0, (-1, size))
            for size in (block_q, block_kv)
        )
        self.width = int(of_keys.any(1).sum(0).max())
        self.regions_of_block = int(of_rows.any(1).sum(1).max())
        self.has_empty = bool((order.sizes == 0).any())
        self.order = order.to(device)
        self.members = member[order.slots].T.contiguous().to(device)
        self.divisors = order.sizes.clamp(min=1).float()[:, None, None].to(device)
        self.rows = of_rows.sum(1, dtype=torch.float32).to(device)
        values = 2.0 ** torch.arange(WORD, dtype=torch.float32, device="cpu")
        words = of_keys.flatten(0, 1).T.unflatten(1, (-1, WORD)).float() @ values
        self.words = words.contiguous().to(device)
        # Rows past the end are in any region: nothing reads their bits.
        self.row_region = of_rows.int().argmax(2).to(device)


tensor_fields.register(BiFormerPacking, "sparse_fmha.patterns.BiFormerPacking")


@plain_ints
def biformer_packed(
    q: Tensor, k: Tensor, layout: BiFormerPacking, *, top_k: int, per_head: bool = False
) -> BlockMask:
    """Returns the mask of bi-level routing attention with several small regions in each block.

    The same attention as `biformer`, for regions of fewer tokens than a block, those of BiFormer's
    later stages (16 and 4 at 224 pixels): there nearly all rows of a block would be padding. Here
    tokens of region after region fill the blocks, without padding. A list is the union of what its
    rows' regions are routed to, and bitmasks restore each region's own.

        layout = BiFormerPacking(image_regions(28, 28, 7, device=q.device))
        mask = biformer_packed(q, k, layout, top_k=4)
        permuted = map(layout.order.permute, (q, k, v))
        out = layout.order.undo(block_sparse_attention(*permuted, mask))

    Args:
        q: `[B, tokens, Hq, D]`, in the image's order. k: `[B, tokens, Hkv, D]`.
        layout: of these tokens, on their device.
        top_k, per_head: as in `biformer`.

    Returns:
        A mask of `tokens` queries and keys, with lists for each batch entry, and for each head with
        `per_head`. All blocks are in the lists of partial ones. Built without waiting for the
        device, in few kernels.

    Raises:
        ValueError, TypeError: tensors do not match the layout, or a size is not allowed.
    """
    check_instance("layout", layout, BiFormerPacking)
    order = layout.order
    check_q_and_k(q, k)
    check_int("top_k", top_k, 1)
    check_flag("per_head", per_head)
    order.check(q)
    order.check(k)
    with torch.no_grad():
        routed = top_k_blocks(_scores(q, k, layout, per_head), top_k).float()
        batch, heads, regions, _ = routed.shape
        # Which keys each region sees, in words, and which words each block of queries.
        with without_autocast(q.device):
            words = routed.flatten(0, 1) @ layout.words
            some = layout.rows @ words
        each = layout.block_kv // WORD
        if each > 1:
            some = some.unflatten(-1, (-1, each)).amax(-1)
        seen = (some > 0).unflatten(0, (batch, heads))
        blocks = seen.shape[3]
        width = min(blocks, layout.width * min(top_k * layout.regions_of_block, regions))
        counts, indices = block_lists.list_blocks(seen, width)
        table = words.int().short().unflatten(-1, (blocks, each)).transpose(1, 2)
        lists = torch.arange(0, batch * heads * blocks, blocks, device=q.device)
        first = indices.clamp(min=0) + lists.view(batch, heads, 1, 1)
        first = first * regions  # of the table's rows
        places = first[..., None] + layout.row_region[:, None]
        bits = table.reshape(-1, each).index_select(0, places.flatten()).view(torch.uint8)
        rows = seen.shape[2]
        full = counts.new_zeros(counts.shape), indices[..., :0]
        return BlockMask(
            *full, order.tokens, order.tokens, layout.block_q, layout.block_kv,
            partial_counts=counts, partial_indices=indices,
            partial_bits=bits.view(batch, heads, rows, width, layout.block_q, 2 * each),
        )  # fmt: skip


def _scores(q: Tensor, k: Tensor, layout: BiFormerPacking, per_head: bool) -> Tensor:
    """Returns the scores of regions, fp32 `[B, Hq or 1, regions, regions]`."""
    members = layout.members.to(q.dtype)
    means = [_means(x, members.to(x.dtype), layout) for x in (q, k)]
    scores: Tensor
    if per_head or q.shape[2] != k.shape[2]:
        scores = pooled_scores(*means, scale=1.0)
        scores = scores if per_head else scores.sum(1, keepdim=True)
    else:
        with without_autocast(q.device):
            scores = torch.matmul(means[0].flatten(2), means[1].flatten(2).mT)[:, None]
    if layout.has_empty:
        scores = scores.masked_fill(layout.order.sizes == 0, -torch.inf)
    return scores


def _means(x: Tensor, members: Tensor, layout: BiFormerPacking) -> Tensor:
    """Returns the means of regions, fp32 `[B, regions, H, D]`: sums as a product."""
    members = members.expand(x.shape[0], -1, -1)
    sums = fp32_product(members, x.flatten(2)).unflatten(2, x.shape[2:])
    found: Tensor = sums / layout.divisors
    return found
