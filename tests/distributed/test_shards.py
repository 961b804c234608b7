"""Which tokens the ranks have, and the calls of a step: plain integers, in one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from block_masks import Drawn

if not dist.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import StripeMask
from sparse_fmha.distributed import _steps
from sparse_fmha.distributed._shards import Shards

LAYOUTS = {
    "even": lambda length, world: Shards.even(length, world),
    "zigzag": lambda length, world: Shards.zigzag(length, world),
    "last": lambda length, world: Shards.of_lengths([0] * (world - 1) + [length]),
    "chunks": lambda length, world: Shards.balanced(
        [i % 3 for i in range(length)], length, world, unit=1, chunks=2
    ),
}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_layouts_have_every_token_once(world):
    for make, length in itertools.product(LAYOUTS.values(), (0, 1, 7, 48)):
        shards = make(length, world)
        assert (shards.world, shards.length) == (world, length)
        parts = shards.split(2)
        for rank, spans in enumerate(shards.spans):
            tokens = [i for a, b in spans for i in range(a, b)]
            halves = [i for r in (0, 1) for a, b in parts.spans[2 * rank + r] for i in range(a, b)]
            assert tokens == halves
            assert abs(parts.lengths[2 * rank] - parts.lengths[2 * rank + 1]) <= 1


def test_zigzag_and_units():
    assert Shards.zigzag(16, 2).spans == (((0, 4), (12, 16)), ((4, 12),))
    assert Shards.even(100, 2, 32).spans == (((0, 64),), ((64, 100),))
    assert Shards.even(10, 4, 32).spans == ((), (), (), ((0, 10),))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((((4, 4),),), "spans of rank 0 must be ascending and not empty"),
        ((((4, 8), (0, 4)),), "spans of rank 0 must be ascending"),
        ((((0, 4),), ((5, 8),)), "every position once, got 5 after 4 tokens"),
        ((((0, 4),), ((3, 8),)), "every position once, got 3 after 4 tokens"),
    ],
)
def test_spans_that_do_not_fit(spans, message):
    with pytest.raises(ValueError, match=message):
        Shards(spans)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_have_every_visible_pair_once(layout, causal):
    for world, length, length_kv, steps in (
        (1, 5, 5, None), (2, 12, 12, None), (3, 13, 13, 1), (4, 24, 24, 2), (3, 11, 7, None),
        (3, 7, 12, 1),
    ):  # fmt: skip
        queries = LAYOUTS[layout](length, world)
        keys = queries if length == length_kv else Shards.even(length_kv, world)
        met = torch.zeros(length, length_kv, dtype=torch.int)
        plans = [_steps.dense(queries, keys, rank, causal, steps) for rank in range(world)]
        assert len({len(plan) for plan in plans}) == 1
        for rank, plan in enumerate(plans):
            rows = [i for a, b in queries.spans[rank] for i in range(a, b)]
            for number, step in enumerate(plan):
                held = [i for a, b in keys.spans[rank] for i in range(a, b)]
                if number:
                    held = []
                    for source, count in enumerate(step.received):
                        own = [i for a, b in keys.spans[source] for i in range(a, b)]
                        sent = plans[source][number].sent[rank]
                        part = [i for some in sent for i in own[some]]
                        assert len(part) == count
                        held += part
                for piece in step.pieces:
                    i, j = torch.tensor(rows)[piece.rows], torch.tensor(held)[piece.keys]
                    seen = torch.ones(len(i), len(j), dtype=torch.int)
                    if piece.causal:
                        seen = sparse_fmha.reference.causal_mask(len(i), len(j)).int()
                    met[i[:, None], j] += seen
        expected = torch.ones(length, length_kv, dtype=torch.int)
        if causal:
            expected = sparse_fmha.reference.causal_mask(length, length_kv).int()
        assert met.equal(expected)


@pytest.mark.parametrize("world", [2, 8])
def test_keys_that_arrive(world):
    """All others' keys, and with causal in the zig-zag order three quarters of these."""
    shards = Shards.zigzag(64 * world, world)
    for causal, part in ((False, 1), (True, 0.75)):
        plans = [_steps.dense(shards, shards, rank, causal, None) for rank in range(world)]
        arrived = sum(sum(step.received) for plan in plans for step in plan)
        assert arrived == 64 * world * (world - 1) * part


def test_row_weights_count_what_causal_leaves():
    for causal in (False, True):
        mask = Drawn(300, 200, 64, 32, batch=2, heads=3, causal=causal, seed=3).mask()
        reach = torch.ones(5, 7, dtype=torch.bool)
        if causal:
            reach = sparse_fmha.reference.causal_mask(300, 200)
            padded = torch.zeros(320, 224, dtype=torch.bool)
            padded[:300, :200] = reach
            reach = padded.unflatten(0, (5, 64)).unflatten(2, (7, 32)).any(3).any(1)
        expected = (mask.blocks() & reach).sum((0, 1, 3)) * 32
        assert sd.row_weights(mask) == expected.tolist()
    stripes = StripeMask(
        torch.tensor([[3, 90, -1], [0, 70, 120]]).int()[None, None],
        torch.tensor([[[2, 3]]]).int(), 128, 128, 64,
        torch.tensor([[10], [130]]).int()[None, None], torch.tensor([[[1, 0]]]).int(), causal=True,
    )  # fmt: skip
    assert sd.row_weights(stripes) == [65, 3]
    with pytest.raises(TypeError, match="mask must be a BlockMask or StripeMask, got int"):
        sd.row_weights(3)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_balanced_by_weight(world):
    """Causal lists, and heavy tails that zig-zag leaves to some ranks."""
    units = 256
    causal = [float(i + 1) for i in range(units)]
    anchors = [100.0 if i % 37 < 2 else 10.0 for i in range(units)]
    tail = [3000.0 / (i + 1) for i in range(units)]
    for weights, most in ((causal, 1.02), (anchors, 1.1), (tail, 1.7)):
        shards = Shards.balanced(weights, units * 64, world, unit=64)
        assert set(shards.lengths) == {units * 64 // world}
        loads = shards.weights(weights, 64)
        assert sum(loads) == pytest.approx(sum(weights))
        zigzag = max(Shards.zigzag(units * 64, world, 64).weights(weights, 64))
        assert max(loads) <= zigzag * 1.0001
        heaviest = max(sum(weights) / world, max(weights))
        assert max(loads) <= most * heaviest
    even = [1.0] * units
    assert Shards.balanced(even, units, world, unit=1) == Shards.even(units, world)
    with pytest.raises(ValueError, match="one entry for each of the 256 units, got 255"):
        Shards.balanced(even[:-1], units, world, unit=1)
