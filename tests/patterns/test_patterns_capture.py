"""What chooses blocks by q and k neither asks the host nor holds pairs of tokens."""

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import patterns
from sparse_fmha.selection import (
    BlockGrid,
    block_scores,
    reductions,
    top_k_blocks,
    top_k_indices,
    top_p_blocks,
)

LENGTH = 1536


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: bool(x.any()),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x.masked_fill_(x > 0, 0).index_put_((x > 0,), x[0]),
    ],
)
def test_the_watch_sees(ask):
    with pytest.raises(AssertionError), Watch():
        ask(torch.ones(2))


def top_k(q, k):
    grid = BlockGrid.of(q, k, 64, 32, causal=True)
    blocks = top_k_blocks(block_scores(q, k, grid), 3)
    return grid.mask(blocks | grid.sink(10) | grid.local(100) | grid.tokens(-20), 24)


def top_k_lists(q, k):
    grid = BlockGrid.of(q, k, 64, 64)
    counts, indices = top_k_indices(block_scores(q, k, grid), 3)
    sizes = (*q.shape[1:2], *k.shape[1:2], 64, 64)
    chosen = type(grid.mask(grid.none()))(counts, indices, *sizes)
    return chosen | grid.mask(grid.last_queries(3)) | grid.mask(grid.diagonal())


def top_p(q, k):
    grid = BlockGrid.of(q, k, 128, 64, causal=True)
    shares = block_scores(q, k, grid, softmax=True)
    blocks = top_p_blocks(shares, 0.8, min_blocks=2, max_blocks=9)
    return grid.mask(blocks) | grid.mask(grid.sink(1))


GATE = patterns.SeerAttentionGate(4, 2, 16, gate_dim=16)
LAYOUT = patterns.BiFormerLayout(patterns.image_regions(32, 48, 7), block_kv=16)
PACKING = patterns.BiFormerPacking(patterns.image_regions(32, 48, 7))
PATHS = {
    "top_k": top_k,
    "top_k_lists": top_k_lists,
    "top_p": top_p,
    "minference": lambda q, k: patterns.minference_block_sparse(q, k, top_k=5),
    "flexprefill": patterns.flexprefill_query_aware,
    "biformer": lambda q, k: patterns.biformer(q, k, LAYOUT, top_k=4),
    "biformer_heads": lambda q, k: patterns.biformer(q, k, LAYOUT, top_k=4, per_head=True),
    "biformer_packed": lambda q, k: patterns.biformer_packed(q, k, PACKING, top_k=4),
    "dhsa_blocks": lambda q, k: patterns.dhsa_blocks(q, k, shared=True),
    "ssa": lambda q, k: patterns.ssa(q, k, blocks=4),
    "seer": GATE.mask,
    "seer_top_k": lambda q, k: GATE.mask(q, k, top_k=4),
}


def inputs(device="cpu"):
    q = torch.randn(1, LENGTH, 4, 16, generator=torch.Generator().manual_seed(0))
    return q.to(device), (q[:, :, :2] + 1).to(device)


@pytest.mark.parametrize("name", PATHS)
def test_from_tokens_to_a_mask_without_the_host(name):
    q, k = inputs()
    with Watch() as watch:
        mask = PATHS[name](q, k)
    mask.validate()
    assert mask.blocks().any()
    # The largest are copies of the tokens themselves, or bitmasks.
    assert watch.largest <= 4 * LENGTH * LENGTH // 8


@pytest.mark.parametrize("name", [name for name in PATHS if name[:2] not in ("bi", "se")])
def test_shapes_do_not_depend_on_data(name):
    """On the meta device there is no data."""
    real, meta = PATHS[name](*inputs()), PATHS[name](*inputs("meta"))
    assert meta.indices.shape == real.indices.shape
    assert meta.indices.device.type == "meta"


def test_the_ground_truth_never_has_the_map():
    q, k = inputs()
    with Watch() as watch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "SLICE", 1)
        patterns.seer_ground_truth(q, k)
    assert watch.largest <= 2 * 64 * LENGTH  # a query block of the 2 query heads of a key head


@pytest.mark.parametrize(
    "name",
    [
        "top_p",
        "minference",
        "flexprefill",
        "biformer",
        "biformer_packed",
        "dhsa_blocks",
        "ssa",
        "seer",
    ],
)
def test_it_can_be_traced_in_one_graph(name):
    def lists(q, k):
        mask = PATHS[name](q, k)
        partial = mask.partial_counts, mask.partial_indices, mask.partial_bits
        return [x for x in (mask.counts, mask.indices, *partial) if x is not None]

    traced = torch.compile(lists, fullgraph=True, backend="eager")
    for made, expected in zip(traced(*inputs()), lists(*inputs()), strict=True):
        assert torch.equal(made, expected)
