"""BiFormer: each region of an image attends to the regions with the best-matching means."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_flag, check_instance, check_int, check_q_and_k, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists, tensor_fields
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.tensor_fields import TensorFields
from sparse_fmha.patterns.regions import RegionOrder
from sparse_fmha.selection import pooled_scores, top_k_blocks


@plain_ints
def image_regions(
    height: int, width: int, regions: int = 7, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the region of each token of an image, int64 `[height * width]`, in row-major order.

    There are `regions` regions per side, of `ceil(height / regions) x ceil(width / regions)`
    tokens; the last ones may be smaller or empty. BiFormer's padding gives the same regions. It
    uses 7 for ImageNet at 224, 8 for ADE20K at 512, 16 for COCO.
    """
    for name, value in (("height", height), ("width", width), ("regions", regions)):
        check_int(name, value, 1)
    y = torch.arange(height, device=device) // ceil_div(height, regions)
    x = torch.arange(width, device=device) // ceil_div(width, regions)
    return (y[:, None] * regions + x).flatten()


class BiFormerLayout(TensorFields):
    """Order of queries and keys, by region, for attention between regions.

    The queries of each region are padded to blocks of `block_q`, the keys to blocks of `block_kv`.
    A small `block_kv` reduces padding.

    `to`, saving and use as a pytree node work as for `BlockMask`.

    Attributes:
        queries, keys: `RegionOrder`.

    Args:
        region: integers `[tokens]`, any partition, e.g. from `image_regions`. Read by the host.
        regions: number of regions; default `region.max() + 1`.
        block_q, block_kv: block sizes of the mask.
        device: device of the tensors; default that of `region`.
    """

    TENSORS = ("queries", "keys")

    @plain_ints
    def __init__(
        self,
        region: Tensor,
        *,
        regions: int | None = None,
        block_q: int = 64,
        block_kv: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        self.queries = RegionOrder(region, block_q, regions=regions, device=device)
        self.keys = RegionOrder(region, block_kv, regions=regions, device=device)


tensor_fields.register(BiFormerLayout, "sparse_fmha.patterns.BiFormerLayout")


@plain_ints
def biformer(
    q: Tensor, k: Tensor, layout: BiFormerLayout, *, top_k: int, per_head: bool = False
) -> BlockMask:
    """Returns the mask of bi-level routing attention, for tokens in the layout's order.

        A[R, S] = mean of q over region R . mean of k over region S, heads concatenated;
        a token of R sees all tokens of the `top_k` regions S with the largest A[R, S].

    Source: Zhu et al. 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention",
    arXiv:2303.08810, section 3.2; its four stages use a top_k of 1, 4, 16 and all regions. Padding
    is masked by bitmasks; in the authors' later code it has weight.

        layout = BiFormerLayout(image_regions(56, 56, 7, device=q.device))
        mask = biformer(q, k, layout, top_k=4)
        permuted = layout.queries.permute(q), layout.keys.permute(k), layout.keys.permute(v)
        out = layout.queries.undo(block_sparse_attention(*permuted, mask))

    BiFormer scales by the channels of all heads, `(heads * D)**-0.5`.

    Args:
        q: `[B, tokens, Hq, D]`, in the image's order. k: `[B, tokens, Hkv, D]`.
        layout: order of these tokens, on their device.
        top_k: regions for each region; empty regions are never selected.
        per_head: route each query head by its own scores.

    Returns:
        A mask of `layout.queries.length` queries and `layout.keys.length` keys, with lists for each
        batch entry, and for each head with `per_head`. Built without waiting for the device.

    Raises:
        ValueError, TypeError: tensors do not match the layout, or a size is not allowed.
    """
    check_instance("layout", layout, BiFormerLayout)
    queries, keys = layout.queries, layout.keys
    routed = _routed(q, k, queries, keys, top_k, per_head)
    # All query blocks of a region share its lists.
    blocks = routed.index_select(3, keys.block_region)
    whole = keys.present.all(1)
    width = min(top_k, keys.regions) * keys.most_blocks

    def listed(blocks: Tensor, width: int) -> tuple[Tensor, Tensor]:
        counts, indices = block_lists.list_blocks(blocks, width)
        rows = queries.block_region
        return counts.index_select(2, rows), indices.index_select(2, rows)

    lists = listed(blocks & whole, width)
    sizes = (queries.length, keys.length, queries.block, keys.block)
    if not keys.padded:
        return BlockMask(*lists, *sizes)
    # At most one block of a region has padding.
    counts, indices = listed(blocks & ~whole, min(top_k, keys.regions))
    columns = pack_columns(keys.present)[indices.clamp(min=0).long()]
    bits = columns[..., None, :].expand(*indices.shape, queries.block, -1)
    return BlockMask(
        *lists, *sizes, partial_counts=counts, partial_indices=indices, partial_bits=bits
    )


def _routed(
    q: Tensor, k: Tensor, queries: RegionOrder, keys: RegionOrder, top_k: int, per_head: bool
) -> Tensor:
    """Returns which regions see which, bool `[B, Hq or 1, regions, regions]`."""
    check_q_and_k(q, k)
    check_int("top_k", top_k, 1)
    check_flag("per_head", per_head)
    scores = pooled_scores(queries.means(q), keys.means(k), scale=1.0)
    if not per_head:
        scores = scores.sum(1, keepdim=True)
    return top_k_blocks(scores.masked_fill(keys.sizes == 0, -torch.inf), top_k)


def pack_columns(present: Tensor) -> Tensor:
    """Packs bool `[n, block]` into uint8 `[n, block / 8]`, lowest bit first, without host data."""
    bits: Tensor = present.unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1).to(torch.uint8)
