"""FlexAttention as a peer: masks of block lists, and of neighborhoods on tokens in their order or
in tiles."""

from __future__ import annotations

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.cases import block_lists, grids
from benchmarks.cases.case import Case
from benchmarks.harness.names import UnavailableError

BLOCK = 128  # tokens; the unit of its block lists
# The tiles that NATTEN has for 128 tokens. The first that divides the grid is taken.
BOXES = {2: [(16, 8), (8, 16)], 3: [(2, 8, 8), (4, 4, 8)]}


def flex(case: Case, q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask, options = None, None
    if case.lists:
        mask, options = lists_mask(case), kernel_options(case)
    elif case.window:
        mask = block_mask(case, torch.arange(case.length, device=q.device))
    elif case.causal:
        visible = lambda b, h, i, j: i >= j  # noqa: E731
        mask = create_block_mask(visible, None, None, case.length, case.length, device=q.device)
    compiled = _compiled(flex_attention)
    gqa = case.heads_q != case.heads_kv
    more = {"block_mask": mask, "enable_gqa": gqa, "kernel_options": options}
    return lambda: compiled(q, k, v, **more).transpose(1, 2)


def flex_tiled(case: Case, q, k, v):
    """The whole op from and to the layout of the others: its copies into tiles and back count."""
    box = box_of(case)
    mask = block_mask(case, grids.tile_order(case.grid, box).to(q.device))
    q, k, v = (x.view(x.shape[0], *case.grid, *x.shape[2:]) for x in (q, k, v))
    gqa = case.heads_q != case.heads_kv
    # Apart: where one graph has the copies too, torch 2.13 fails to lower flex_attention.
    into = _compiled(lambda *tensors: [grids.to_tiles(x, box) for x in tensors])
    attend, back = _compiled(flex_attention), _compiled(grids.from_tiles)

    def op():
        return back(attend(*into(q, k, v), block_mask=mask, enable_gqa=gqa), case.grid, box)

    return op


def _compiled(function):
    """Each case compiles anew; past torch's limit it would run uncompiled, all scores in memory."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False, fullgraph=True)


def box_of(case: Case) -> tuple[int, ...]:
    if case.lists:
        raise UnavailableError("the lists are of tokens in their order: flex is the same")
    if len(case.grid) < 2:
        raise UnavailableError("a sequence is in tiles already: flex is the same")
    if set(case.dilation) != {1}:
        raise UnavailableError("tiles of dilated grids are not written")
    for box in BOXES[len(case.grid)]:
        if not any(length % side for length, side in zip(case.grid, box, strict=True)):
            return box
    raise UnavailableError(f"no tile of {BLOCK} tokens divides the grid")


def block_mask(case: Case, order: torch.Tensor) -> BlockMask:
    """The mask over tokens of which `order` has the row-major indices."""
    partly, fully = grids.block_kinds(case.axes, order, BLOCK)
    return BlockMask.from_kv_blocks(
        *_lists(partly & ~fully), *_lists(fully),
        BLOCK_SIZE=BLOCK, mask_mod=visible(case, order), seq_lengths=(len(order), len(order)),
    )  # fmt: skip


def lists_mask(case: Case) -> BlockMask:
    """The lists of a block-sparse case as they are; the mask_mod is asked in partial blocks, and
    everywhere where the op is not compiled."""
    block_q, block_kv = case.lists.block_q, case.lists.block_kv
    blocks, bits = block_lists.draw(case.lists, case.heads_q, case.length, case.device)
    listed, none = _lists(blocks), _lists(torch.zeros_like(blocks))

    def is_listed(batch, head, i, j):
        return blocks[head, i // block_q, j // block_kv]

    mask_mod = is_listed
    if bits is not None:
        slot = block_lists.slots(blocks)

        def mask_mod(batch, head, i, j):
            n, m = i // block_q, j // block_kv
            byte = bits[head, n, slot[head, n, m], i % block_q, j % block_kv // 8]
            return blocks[head, n, m] & (((byte >> (j % 8)) & 1) == 1)

    return BlockMask.from_kv_blocks(
        *(none if bits is None else listed), *(listed if bits is None else none),
        BLOCK_SIZE=(block_q, block_kv), mask_mod=mask_mod, seq_lengths=(case.length, case.length),
    )  # fmt: skip


def kernel_options(case: Case) -> dict[str, int] | None:
    """Its tiles must divide the blocks; those it would choose are of 128 queries and 64 keys or
    more."""
    lists = case.lists
    if lists.block_q >= BLOCK and lists.block_kv >= BLOCK:
        return None
    return {"BLOCK_M": min(lists.block_q, BLOCK), "BLOCK_N": min(lists.block_kv, BLOCK // 2)}


def _lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, heads, rows] and indices [1, heads, rows, columns] of what is set in each row; of
    one head where `blocks` has none."""
    if blocks.dim() == 2:
        blocks = blocks[None]
    counts, indices = block_lists.compact(blocks)
    return counts[None], indices[None]


def visible(case: Case, order: torch.Tensor):
    """A mask_mod that looks up, per axis, the window of a query and the place of a key.

    A lookup for a row or a column of scores is cheaper than the divisions of the formula.
    """
    tables = []
    coordinates = torch.unravel_index(order, case.grid)
    for axis, i in zip(case.axes, coordinates, strict=True):
        dilation = axis[3]
        a, b = grids.windows(axis).to(order.device).int()[i].T.contiguous()
        residue = (i % dilation).int() if dilation > 1 else None
        tables.append((a, b, (i // dilation).int(), residue))

    def mask_mod(batch, head, i, j):
        seen = None
        for a, b, t, residue in tables:
            one = (a[i] <= t[j]) & (t[j] < b[i])
            if residue is not None:
                one = one & (residue[i] == residue[j])
            seen = one if seen is None else seen & one
        return seen

    return mask_mod
