"""Wrong block masks: each error names the argument, its value and what is allowed."""

import pytest
import torch
from block_masks import Drawn

from sparse_fmha import BlockMask

FAULTS = {
    "counts of .* 0 to 3, the width": {"counts": [[[4]]]},
    "counts of .*0, 0, 0.* 0 to 3, the width": {"counts": [[[-1]]]},
    "must have a key block from 0 to 3 in slot 1": {"indices": [[[[0, 4, 5]]]]},
    "must have a key block from 0 to 3 in slot 0": {"indices": [[[[-2, 1, 3]]]]},
    "must ascend and list each block once, also after slot 1": {"indices": [[[[1, 3, 2]]]]},
    "must ascend and list each block once, also after slot 0": {"indices": [[[[1, 1, 2]]]]},
    "partial_indices of .* must have a key block .* in slot 0": {"partial_indices": [[[[9, 0]]]]},
    "partial_counts of .* 0 to 2, the width": {"partial_counts": [[[3]]]},
    "block 2 of .*0, 0, 0.* must be full or partial, got both": {"partial_indices": [[[[2, 0]]]]},
}


def small(**changes):
    tensors = {
        "counts": [[[3]]],
        "indices": [[[[0, 1, 2]]]],
        "partial_counts": [[[1]]],
        "partial_indices": [[[[3, 0]]]],
    }
    tensors = {
        name: torch.tensor(changes.pop(name, value), dtype=torch.int32)
        for name, value in tensors.items()
    }
    bits = torch.zeros(1, 1, 1, 2, 64, 4, dtype=torch.uint8)
    options = {"q_len": 60, "kv_len": 100, "block_q": 64, "block_kv": 32, "partial_bits": bits}
    return BlockMask(**tensors, **options | changes)


@pytest.mark.parametrize(("message", "change"), FAULTS.items())
def test_validation_names_the_fault(message, change):
    small(validate=True)
    with pytest.raises(ValueError, match=message):
        small(validate=True, **change)
    small(**change)  # unchecked otherwise


def test_validation_of_lists_in_any_order():
    def make(indices, counts=None):
        indices = torch.tensor([[[indices]]], dtype=torch.int32)
        counts = counts and torch.tensor([[[counts]]], dtype=torch.int32)
        return BlockMask.from_indices(counts, indices, 60, 400, validate=True)

    assert make([3, -1, 0, 2]).counts.item() == 3
    with pytest.raises(ValueError, match="a block twice"):
        make([3, -1, 3])
    with pytest.raises(ValueError, match="must have a key block from 0 to 3 in slot 1"):
        make([3, 4])
    with pytest.raises(ValueError, match="0 to 2, the width"):
        make([3, 1], counts=3)
    unchecked = torch.tensor([[[[3, 4, -9]]]], dtype=torch.int32)
    mask = BlockMask.from_indices(None, unchecked, 60, 400)
    assert mask.blocks().tolist() == [[[[False, False, False, True]]]]


ERRORS = {
    "block_q must be 64 or 128, got 32": (ValueError, {"block_q": 32}),
    "block_kv must be 16, 32, 64 or 128, got 48": (ValueError, {"block_kv": 48}),
    "q_len must be at least 0, got -1": (ValueError, {"q_len": -1}),
    "kv_len must be an int, got 1.5": (TypeError, {"kv_len": 1.5}),
    "causal must be True or False, got 1": (TypeError, {"causal": 1}),
    "counts must have .*2 query blocks of 64.*, got .*": (ValueError, {"q_len": 70}),
    r"partial_bits must have shape \[1, 1, 1, 2, 64, 8\], got \[1, 1, 1, 2,": (
        ValueError,
        {"block_kv": 64},
    ),
    "partial tensors must be given all or none, got none for partial_bits": (
        ValueError,
        {"partial_bits": None},
    ),
    "partial_bits must have dtype torch.uint8, got torch.int32": (
        TypeError,
        {"partial_bits": torch.zeros(1, 1, 1, 2, 64, 4, dtype=torch.int32)},
    ),
}


@pytest.mark.parametrize(("message", "fault"), ERRORS.items())
def test_errors(message, fault):
    error, change = fault
    with pytest.raises(error, match=message):
        small(**change)


def test_errors_of_tensors():
    counts, indices = torch.zeros(1, 1, 2).int(), torch.zeros(1, 1, 2, 3).int()
    with pytest.raises(TypeError, match=r"counts must have dtype torch.int32, got torch.int64"):
        BlockMask(counts.long(), indices, 200, 300)
    with pytest.raises(TypeError, match="indices must be a tensor, got list"):
        BlockMask(counts, [1], 200, 300)
    with pytest.raises(ValueError, match=r"indices must have .*4 dimensions.*, got .*\[1, 2, 3\]"):
        BlockMask(counts, indices[0], 200, 300)
    with pytest.raises(
        ValueError, match=r"indices must have the shape of counts, \[1, 1, 2\], and one more"
    ):
        BlockMask(counts, indices.expand(2, 1, 2, 3), 200, 300)
    with pytest.raises(ValueError, match="indices must be on the device of counts, cpu, got meta"):
        BlockMask(counts, indices.to("meta"), 200, 300)
    with pytest.raises(TypeError, match=r"blocks must have dtype torch.bool, got torch.int32"):
        BlockMask.from_blocks(indices, 200, 300)
    with pytest.raises(
        ValueError, match=r"blocks must have shape \[batch or 1, heads or 1, 2, 3\]"
    ):
        BlockMask.from_blocks(indices[..., :2].bool(), 200, 300)
    with pytest.raises(TypeError, match=r"visible must have .*dtype.*, got torch.float32"):
        BlockMask.from_dense(torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match=r"visible must have .*, got .*\[5\]"):
        BlockMask.from_dense(torch.ones(5).bool())


def test_errors_of_constructors():
    blocks, dense = torch.ones(1, 1, 2, 3).bool(), torch.ones(1, 1, 200, 300).bool()
    for name, make in {
        "width": lambda width: BlockMask.from_blocks(blocks, 200, 300, width=width),
        "partial_width": lambda width: BlockMask.from_dense(dense, partial_width=width),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be at least 0, got -1"):
            make(-1)
        with pytest.raises(TypeError, match=f"^{name} must be an int, got 2.5"):
            make(2.5)
    with pytest.raises(TypeError, match="indices must be a tensor, got list"):
        BlockMask.from_indices(None, [1, 2], 200, 300)
    with pytest.raises(TypeError, match=r"indices must have dtype torch.int32, got torch.int64"):
        BlockMask.from_indices(None, torch.zeros(1, 1, 2, 3).long(), 200, 300)
    with pytest.raises(ValueError, match=r"indices must have .*4 dimensions.*, got .*\[1, 2\]"):
        BlockMask.from_indices(None, torch.zeros(1, 2).int(), 200, 300)
    with pytest.raises(
        ValueError, match=r"counts must have 2 query blocks of 128, got shape \[1, 1, 3\]"
    ):
        BlockMask.from_indices(None, torch.zeros(1, 1, 3, 2).int(), 200, 300)


def test_union_of_other_masks_is_refused():
    mask = Drawn(200, 300).mask()
    for name, other in {
        "q_len": Drawn(201, 300),
        "kv_len": Drawn(200, 301),
        "block_q": Drawn(200, 300, 64),
        "block_kv": Drawn(200, 300, 128, 64),
        "causal": Drawn(200, 300, causal=True),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be the same in all masks, got "):
            mask | other.mask()
    with pytest.raises(ValueError, match="heads of the masks must be equal or 1, got 2 and 3"):
        Drawn(200, 300, heads=2).mask() | Drawn(200, 300, heads=3).mask()
    with pytest.raises(TypeError, match="unsupported operand"):
        mask | 3
    with pytest.raises(TypeError, match="masks must be BlockMasks, got int"):
        BlockMask.union(mask, 3)
    with pytest.raises(ValueError, match="masks must have at least one mask, got none"):
        BlockMask.union()
    with pytest.raises(
        ValueError, match="batch entries of the masks must be equal or 1, got 3 and 2"
    ):
        BlockMask.union(mask, *(Drawn(200, 300, batch=n).mask() for n in (3, 2)))
    with pytest.raises(ValueError, match="device must be the same in all masks, got cpu and meta"):
        mask | mask.to("meta")


def test_intersection_of_other_masks_is_refused():
    mask = Drawn(200, 300).mask()
    with pytest.raises(ValueError, match="kv_len must be the same in all masks, got 300 and 301"):
        mask & Drawn(200, 301).mask()
    with pytest.raises(TypeError, match="unsupported operand"):
        mask & 3
    with pytest.raises(TypeError, match="masks must be BlockMasks, got int"):
        BlockMask.intersection(mask, 3)
    with pytest.raises(ValueError, match="masks must have at least one mask, got none"):
        BlockMask.intersection()
