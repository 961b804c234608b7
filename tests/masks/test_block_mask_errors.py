"""Wrong block masks: each error names the argument, its value and what is allowed."""

import pytest
import torch
from block_masks import Drawn

from sparse_fmha import BlockMask

FAULTS = {
    "counts of .* 0 to 3, the width": {"counts": [[[4]]]},
    "counts of .*0, 0, 0.* 0 to 3, the width": {"counts": [[[-1]]]},
    "no key block in slot 1; 0 to 3 are allowed": {"indices": [[[[0, 4, 5]]]]},
    "no key block in slot 0": {"indices": [[[[-2, 1, 3]]]]},
    "do not ascend after slot 1": {"indices": [[[[1, 3, 2]]]]},
    "do not ascend after slot 0; each block may be there once": {"indices": [[[[1, 1, 2]]]]},
    "partial_indices of .* no key block in slot 0": {"partial_indices": [[[[9, 0]]]]},
    "partial_counts of .* 0 to 2, the width": {"partial_counts": [[[3]]]},
    "block 2 of .*0, 0, 0.* is full and partial": {"partial_indices": [[[[2, 0]]]]},
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
    with pytest.raises(ValueError, match="no key block in slot 1; 0 to 3 are allowed"):
        make([3, 4])
    with pytest.raises(ValueError, match="0 to 2, the width"):
        make([3, 1], counts=3)
    unchecked = torch.tensor([[[[3, 4, -9]]]], dtype=torch.int32)
    mask = BlockMask.from_indices(None, unchecked, 60, 400)
    assert mask.blocks().tolist() == [[[[False, False, False, True]]]]


ERRORS = {
    "block_q is 32; allowed are: 64, 128": (ValueError, {"block_q": 32}),
    "block_kv is 48; allowed are: 16, 32, 64, 128": (ValueError, {"block_kv": 48}),
    "q_len is -1; at least 0": (ValueError, {"q_len": -1}),
    "kv_len is 1.5; an int is needed": (TypeError, {"kv_len": 1.5}),
    "causal is 1; True or False": (TypeError, {"causal": 1}),
    "counts has shape .*; 2 query blocks of 64 are needed": (ValueError, {"q_len": 70}),
    "partial_bits has shape .* 64, 8. is needed": (ValueError, {"block_kv": 64}),
    "partial_bits missing; partial tensors are given all or none": (
        ValueError,
        {"partial_bits": None},
    ),
    "partial_bits has dtype torch.int32; torch.uint8 is needed": (
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
    with pytest.raises(TypeError, match=r"counts has dtype torch.int64; torch.int32 is needed"):
        BlockMask(counts.long(), indices, 200, 300)
    with pytest.raises(TypeError, match="indices is a list, not a tensor"):
        BlockMask(counts, [1], 200, 300)
    with pytest.raises(ValueError, match=r"indices has shape \[1, 2, 3\]; 4 dimensions are needed"):
        BlockMask(counts, indices[0], 200, 300)
    with pytest.raises(ValueError, match="they must agree but for the last dimension"):
        BlockMask(counts, indices.expand(2, 1, 2, 3), 200, 300)
    with pytest.raises(ValueError, match="counts is on cpu, indices on meta"):
        BlockMask(counts, indices.to("meta"), 200, 300)
    with pytest.raises(TypeError, match=r"blocks has dtype torch.int32; torch.bool is needed"):
        BlockMask.from_blocks(indices, 200, 300)
    with pytest.raises(ValueError, match=r"blocks has shape .*; \[batch or 1, heads or 1, 2, 3\]"):
        BlockMask.from_blocks(indices[..., :2].bool(), 200, 300)
    with pytest.raises(TypeError, match=r"visible has dtype torch.float32"):
        BlockMask.from_dense(torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match=r"visible has shape \[5\]"):
        BlockMask.from_dense(torch.ones(5).bool())


def test_errors_of_constructors():
    blocks, dense = torch.ones(1, 1, 2, 3).bool(), torch.ones(1, 1, 200, 300).bool()
    for name, make in {
        "width": lambda width: BlockMask.from_blocks(blocks, 200, 300, width=width),
        "partial_width": lambda width: BlockMask.from_dense(dense, partial_width=width),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} is -1; at least 0 is needed"):
            make(-1)
        with pytest.raises(TypeError, match=f"^{name} is 2.5; an int is needed"):
            make(2.5)
    with pytest.raises(TypeError, match="indices is a list, not a tensor"):
        BlockMask.from_indices(None, [1, 2], 200, 300)
    with pytest.raises(TypeError, match=r"indices has dtype torch.int64; torch.int32 is needed"):
        BlockMask.from_indices(None, torch.zeros(1, 1, 2, 3).long(), 200, 300)
    with pytest.raises(ValueError, match=r"indices has shape \[1, 2\]; 4 dimensions are needed"):
        BlockMask.from_indices(None, torch.zeros(1, 2).int(), 200, 300)
    with pytest.raises(ValueError, match="2 query blocks of 128 are needed"):
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
        with pytest.raises(ValueError, match=f"{name} is .* in one mask and .* in the other"):
            mask | other.mask()
    with pytest.raises(ValueError, match="2 and 3 heads; equal or 1 is needed"):
        Drawn(200, 300, heads=2).mask() | Drawn(200, 300, heads=3).mask()
    with pytest.raises(TypeError, match="unsupported operand"):
        mask | 3
    with pytest.raises(TypeError, match="masks have a int among them; BlockMask is needed"):
        BlockMask.union(mask, 3)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        BlockMask.union()
    with pytest.raises(ValueError, match="3 and 2 batch entries; equal or 1 is needed"):
        BlockMask.union(mask, *(Drawn(200, 300, batch=n).mask() for n in (3, 2)))
    with pytest.raises(ValueError, match="device is cpu in one mask and meta in the other"):
        mask | mask.to("meta")


def test_intersection_of_other_masks_is_refused():
    mask = Drawn(200, 300).mask()
    with pytest.raises(ValueError, match="kv_len is 300 in one mask and 301 in the other"):
        mask & Drawn(200, 301).mask()
    with pytest.raises(TypeError, match="unsupported operand"):
        mask & 3
    with pytest.raises(TypeError, match="masks have a int among them; BlockMask is needed"):
        BlockMask.intersection(mask, 3)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        BlockMask.intersection()
