"""Masks of key blocks against masks made token by token."""

import subprocess
import sys

import pytest
import torch
from block_masks import Drawn, drawn
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_fmha
from sparse_fmha import BlockMask, reference


@given(drawn())
def test_the_lists_mean_what_the_reference_says(case):
    mask, dense = case.mask(), case.dense()
    mask.validate()
    assert mask.to_dense().equal(dense)
    kinds, _ = case.tensors()
    assert mask.blocks().equal(kinds > 0)
    assert mask.visible_pairs() == dense.sum()
    assert mask.density == pytest.approx(dense.double().mean().item(), abs=1e-12)
    assert mask.block_density == pytest.approx((kinds > 0).double().mean().item(), abs=1e-6)
    assert mask.shape == dense.shape


@given(drawn())
def test_from_blocks(case):
    blocks = case.tensors()[0] == 1
    mask = BlockMask.from_blocks(blocks, *case.sizes, causal=case.causal)
    mask.validate()
    dense = reference.block_sparse_mask(*case.lists(1), *case.sizes, causal=case.causal)
    assert mask.to_dense().equal(dense)
    if case.causal:  # no block is kept in which nothing is visible
        rows, columns = blocks.shape[2:]
        for row in range(rows):
            for column in range(columns):
                block = dense[:, :, row * case.block_q :, column * case.block_kv :]
                block = block[:, :, : case.block_q, : case.block_kv]
                assert (mask.blocks()[:, :, row, column] <= block.any(-1).any(-1)).all()
    else:
        assert mask.blocks().equal(blocks)


def test_from_blocks_with_a_width_keeps_the_first():
    blocks = torch.tensor([[[[True, False, True, True]]]])
    mask = BlockMask.from_blocks(blocks, 100, 500, width=2)
    assert mask.indices.tolist() == [[[[0, 2]]]]
    assert mask.counts.tolist() == [[[2]]]


@given(drawn(), st.data())
def test_from_indices_in_any_order(case, data):
    counts, indices = case.lists(1)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    doubled = torch.cat([indices, indices, torch.full_like(indices, -1)], -1)
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    keep = torch.cat([listed, listed, listed], -1)
    doubled = torch.where(keep, doubled, -1)
    doubled = doubled[..., torch.randperm(doubled.shape[-1], generator=generator)]
    mask = BlockMask.from_indices(None, doubled, *case.sizes, causal=case.causal)
    mask.validate()
    expected = reference.block_sparse_mask(counts, indices, *case.sizes, causal=case.causal)
    assert mask.to_dense().equal(expected)


def test_from_indices_reads_as_far_as_the_counts():
    indices = torch.tensor([[[[3, 1, 0, 2]]]], dtype=torch.int32)
    counts = torch.tensor([[[2]]], dtype=torch.int32)
    mask = BlockMask.from_indices(counts, indices, 10, 500)
    assert mask.indices[0, 0, 0, :2].tolist() == [1, 3]
    assert mask.counts.item() == 2


@given(drawn())
def test_from_dense_is_exact(case):
    dense = case.dense()
    mask = BlockMask.from_dense(dense, case.block_q, case.block_kv)
    mask.validate()
    assert mask.to_dense().equal(dense)
    widest = mask.partial_counts.max().item()
    assert mask.partial_indices.shape[-1] == widest
    kept = BlockMask.from_dense(dense, case.block_q, case.block_kv, partial_width=widest + 1)
    assert kept.to_dense().equal(dense)


def test_full_blocks_of_a_ragged_end_are_full():
    mask = BlockMask.from_dense(torch.ones(1, 1, 70, 150, dtype=torch.bool), 64, 64)
    assert mask.counts.eq(3).all()
    assert mask.partial_counts.eq(0).all()


@given(drawn())
def test_bits_behind_the_ends_do_not_matter(case):
    mask = case.mask()
    bits = torch.nn.functional.pad(case.dense(), (0, -case.kv_len % case.block_kv), value=True)
    beyond = torch.zeros_like(bits)
    beyond[..., case.kv_len :] = True
    last = mask.partial_indices == mask.blocks_kv - 1
    set_bits = mask.partial_bits.clone()
    columns = beyond[0, 0, 0, -case.block_kv :].view(-1, 8).long() << torch.arange(8)
    set_bits[last] |= columns.sum(-1).to(torch.uint8)
    other = BlockMask(
        mask.counts,
        mask.indices,
        *case.sizes,
        causal=case.causal,
        partial_counts=mask.partial_counts,
        partial_indices=mask.partial_indices,
        partial_bits=set_bits,
    )
    assert other.to_dense().equal(mask.to_dense())
    assert other.visible_pairs() == mask.visible_pairs()


@given(drawn(), st.integers(0, 1 << 20), st.booleans(), st.booleans())
def test_union(case, seed, one_batch, one_head):
    other = Drawn(
        *case.sizes,
        1 if one_batch else case.batch,
        1 if one_head else case.heads,
        case.causal,
        case.kinds[::-1],
        seed,
    )
    both = case.mask() | other.mask()
    both.validate()
    assert both.to_dense().equal(case.dense() | other.dense())
    full = BlockMask.from_blocks(other.tensors()[0] > 0, *case.sizes, causal=case.causal)
    assert (full | case.mask()).to_dense().equal(full.to_dense() | case.dense())


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


class NoQuestions(TorchDispatchMode):
    """Refuses what would make the host wait for the device, or a shape depend on data."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name.startswith(refused) for refused in self.REFUSED):
            raise AssertionError(f"{name} asks the device")
        return func(*args, **(kwargs or {}))


def test_from_scores_to_attention_nothing_asks_the_device(randn):
    q, k = randn(1, 300, 2, 16), randn(1, 400, 2, 16, seed=1)
    with NoQuestions():
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, ::64], k[:, ::32])
        top = BlockMask.from_indices(None, scores.topk(3).indices.int(), 300, 400, 64, 32)
        high = BlockMask.from_blocks(scores > 1, 300, 400, 64, 32)
        fixed = BlockMask.from_dense(torch.ones(1, 1, 300, 400).bool(), 64, 32, partial_width=2)
        for mask in (top, high, top | high, top | fixed):
            out = sparse_fmha.block_sparse_attention(q, k, k, mask)
    assert out.isfinite().all()
    with pytest.raises(AssertionError, match="nonzero asks the device"), NoQuestions():
        top.validate()
    with pytest.raises(AssertionError, match="_local_scalar_dense asks the device"), NoQuestions():
        BlockMask.from_dense(torch.rand(1, 1, 300, 400) < 0.5)


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
    with pytest.raises(ValueError, match=r"visible has shape \[5, 5\]"):
        BlockMask.from_dense(torch.ones(5, 5).bool())


def test_no_tokens():
    for q_len, kv_len in ((0, 100), (100, 0), (0, 0)):
        shape = (1, 1, -(-q_len // 128), -(-kv_len // 128))
        mask = BlockMask.from_blocks(torch.ones(shape).bool(), q_len, kv_len)
        assert mask.to_dense().shape == (1, 1, q_len, kv_len)
        assert mask.density == 0
        assert mask.visible_pairs() == 0


def test_to_and_repr():
    case = Drawn(300, 400, 64, 32, heads=3, causal=True)
    mask = case.mask()
    text = repr(mask)
    for part in ("q_len=300", "kv_len=400", "64x32", "1x3", "causal", "partial", "cpu"):
        assert part in text
    assert f"{mask.block_density:.1%}" in text
    assert mask.to("meta").device.type == "meta"
    assert mask.to("cpu").to_dense().equal(case.dense())


def test_plot(tmp_path):
    mask = Drawn(1000, 2000, heads=2).mask()
    mask.plot(tmp_path / "mask.png", head=1)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(IndexError, match="head is 2; the mask has lists for 2"):
        mask.plot(tmp_path / "no.png", head=2)
    Drawn(10, 10, kinds=(1, 0, 0)).mask().plot(tmp_path / "empty.png")


def test_plotting_alone_needs_matplotlib():
    code = "import sys; import sparse_fmha; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
