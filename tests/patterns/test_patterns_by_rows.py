"""Patterns by scores of blocks, made a few rows at a time, against maps of all scores at once.

Tokens are small integers, so that products are exact in any order, and many scores are equal.
"""

import pytest
import torch

from sparse_fmha import patterns
from sparse_fmha.masks import block_lists
from sparse_fmha.selection import BlockGrid, block_scores, choosing, top_k_blocks, top_p_blocks

SHAPES = [(2500, 2500), (1000, 3333), (2500, 1000)]


def tokens(q_len, kv_len):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(-1, 2, (1, n // 64 + 1, h, 16), generator=generator)
        .repeat_interleave(64, 1)[:, :n]
        .float()
        for n, h in ((q_len, 2), (kv_len, 1))
    ]


@pytest.fixture(params=[1, 200, 1 << 18], autouse=True)
def rows_at_a_time(request, monkeypatch):
    """Slices of one row of blocks, of some, of all."""
    elements = request.param
    own = block_lists.chunks

    def chunks(rows, columns, device, _=None):
        return own(rows, columns, device, elements)

    for module in (patterns.minference, patterns.flexprefill, block_lists):
        monkeypatch.setattr(module, "chunks", chunks)


def same(made, expected):
    assert made.counts.equal(expected.counts)
    width = made.indices.shape[-1]
    assert made.indices.equal(expected.indices[..., :width])
    assert (expected.indices[..., width:] == block_lists.ABSENT).all()


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
def test_minference(lengths, causal, top_k):
    q, k = tokens(*lengths)
    grid = BlockGrid.of(q, k, 64, 64, causal=causal)
    expected = grid.mask(top_k_blocks(block_scores(q, k, grid), top_k))
    same(patterns.minference_block_sparse(q, k, top_k=top_k, causal=causal), expected)


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("forced", [True, False])
def test_flexprefill(lengths, causal, gamma, forced, monkeypatch):
    q, k = tokens(*lengths)
    grid = BlockGrid.of(q, k, 64, 64, causal=causal)
    scores = block_scores(q, k, grid, softmax=True)
    rows = grid.reachable().any(-1).sum().double()
    blocks = top_p_blocks(scores.flatten(2), gamma * rows).view(scores.shape)
    if forced:
        blocks = blocks | grid.sink(1) | grid.diagonal()
    monkeypatch.setattr(choosing, "LONG", 1)
    sizes = {"block_q": 64, "block_kv": 64, "causal": causal}
    made = patterns.flexprefill_query_aware(q, k, gamma=gamma, forced=forced, **sizes)
    same(made, grid.mask(blocks))


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dense_rows", [0, 2, 100])
@pytest.mark.parametrize("by", [{"top_k": 3}, {"nz_ratio": 0.5}, {"threshold": 0.03}])
def test_seer_attention(lengths, causal, dense_rows, by):
    q, k = tokens(*lengths)
    gate = patterns.SeerAttentionGate(2, 1, 16, gate_dim=16, k_pools=("mean",))
    gate.inv_freq.zero_()  # no rotation
    torch.nn.init.constant_(gate.weight_k, 0.25)
    grid = BlockGrid.of(q, k, 64, 64, causal=causal)
    if "threshold" in by:
        blocks = gate(q, k, causal=causal, softmax=True) > by["threshold"]
    else:
        most = by.get("top_k") or max(1, int((1 - 0.5**0.5) * grid.shape[1]))
        blocks = top_k_blocks(gate(q, k, causal=causal), most)
    dense = torch.arange(grid.shape[0]) >= grid.shape[0] - dense_rows
    made = gate.mask(q, k, dense_rows=dense_rows, causal=causal, **by)
    same(made, grid.mask(blocks | dense[:, None]))
