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
    mask.validate()
    assert BlockMask.from_blocks(blocks, 100, 500, width=0).blocks().sum() == 0
    with pytest.raises(ValueError, match=r"blocks of .*0, 0, 0.* are more than width 2 can hold"):
        BlockMask.from_blocks(blocks, 100, 500, width=2, validate=True)
    assert BlockMask.from_blocks(blocks, 100, 500, width=3, validate=True).counts.item() == 3


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


@given(drawn(), st.sampled_from([-(2**31), -1, 0, 1 << 20, 2**31 - 1]))
def test_what_is_behind_a_count_does_not_matter(case, value):
    mask = case.mask()
    beyond = {}
    for prefix in ("", "partial_"):
        counts, indices = getattr(mask, f"{prefix}counts"), getattr(mask, f"{prefix}indices")
        wider = torch.nn.functional.pad(indices, (0, 1))
        behind = torch.arange(wider.shape[-1]) >= counts[..., None]
        beyond |= {f"{prefix}counts": counts, f"{prefix}indices": wider.masked_fill(behind, value)}
    bits = torch.nn.functional.pad(mask.partial_bits, (0, 0, 0, 0, 0, 1))
    bits[beyond["partial_indices"] == value] |= 255 * (value not in range(mask.blocks_kv))
    sizes = dict(zip(("q_len", "kv_len", "block_q", "block_kv"), case.sizes, strict=True))
    other = BlockMask(**beyond, **sizes, partial_bits=bits, causal=case.causal, validate=True)
    assert other.to_dense().equal(case.dense())
    assert other.blocks().equal(mask.blocks())
    assert other.visible_pairs() == mask.visible_pairs()
    assert (other | mask).to_dense().equal(case.dense())


def test_counts_are_held_to_the_width_of_the_list():
    indices = torch.tensor([[[[0, 2], [1, 3], [1, 9]]]], dtype=torch.int32)
    counts = torch.tensor([[[7, -3, 2]]], dtype=torch.int32)
    mask = BlockMask(counts, indices, 300, 512)
    assert mask.blocks().int().tolist() == [[[[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]]]
    assert mask.visible_pairs() == 2 * 128 * 128 + 44 * 128


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
    third = Drawn(*case.sizes, causal=case.causal, seed=seed + 1)
    several = BlockMask.union(third.mask(), case.mask(), full, other.mask())
    several.validate()
    expected = third.dense() | case.dense() | full.to_dense() | other.dense()
    assert several.to_dense().equal(expected)
    assert several.visible_pairs() == expected.sum()
    assert BlockMask.union(case.mask()).to_dense().equal(case.dense())
    assert third.mask().union(case.mask(), full, other.mask()).to_dense().equal(expected)
    assert case.mask().union().to_dense().equal(case.dense())


class NoQuestions(TorchDispatchMode):
    """Refuses what would make the host wait for the device, or a shape depend on data."""

    REFUSED = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal",
        "lift_fresh",  # a tensor of Python numbers: the copy to the device waits for it
    )

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
        some = BlockMask.from_blocks(scores < 0, 300, 400, 64, 32, causal=True, width=5)
        below = BlockMask.from_indices(
            some.counts, some.indices.flip(-1), 300, 400, 64, 32, causal=True
        )
        masks = [top, high, some, below, top | high, top | fixed, some | below]
        masks += [top & high, top & fixed, some & high]
        for mask in (*masks, BlockMask.union(fixed, top, fixed, high)):
            out = sparse_fmha.block_sparse_attention(q, k, k, mask)
    assert out.isfinite().all()
    with pytest.raises(AssertionError, match="nonzero asks the device"), NoQuestions():
        top.validate()
    with pytest.raises(AssertionError, match="lift_fresh asks the device"), NoQuestions():
        torch.tensor([1, 2])
    with pytest.raises(AssertionError, match="_local_scalar_dense asks the device"), NoQuestions():
        BlockMask.from_dense(torch.rand(1, 1, 300, 400) < 0.5)


def test_no_tokens(tmp_path):
    for q_len, kv_len in ((0, 100), (100, 0), (0, 0)):
        shape = (1, 1, -(-q_len // 128), -(-kv_len // 128))
        mask = BlockMask.from_blocks(torch.ones(shape).bool(), q_len, kv_len)
        dense = BlockMask.from_dense(torch.ones(1, 1, q_len, kv_len).bool())
        for each in (mask, dense, mask | dense):
            each.validate()
            assert each.to_dense().shape == (1, 1, q_len, kv_len)
            assert each.density == each.block_density == each.visible_pairs() == 0
        mask.plot(tmp_path / "empty.png")


def test_to_and_repr():
    case = Drawn(300, 400, 64, 32, heads=3, causal=True)
    mask = case.mask()
    text = repr(mask)
    for part in ("q_len=300", "kv_len=400", "64x32", "1x3", "causal", "partial", "cpu"):
        assert part in text
    assert f"{mask.block_density:.1%}" in text
    assert repr(mask.to("meta")).endswith("with partial blocks, causal, meta)")
    assert mask.to("cpu").to_dense().equal(case.dense())


def test_plot(tmp_path):
    mask = Drawn(1000, 2000, heads=2).mask()
    mask.plot(tmp_path / "mask.png", head=1)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        IndexError, match="head must be less than the 2 that the mask has lists for, got 2"
    ):
        mask.plot(tmp_path / "no.png", head=2)
    for wrong in (0.0, True):
        with pytest.raises(TypeError, match=f"head must be an int, got {wrong}"):
            mask.plot(tmp_path / "no.png", head=wrong)
    with pytest.raises(ValueError, match=r"path must end in .png, got .*no.pdf"):
        mask.plot(tmp_path / "no.pdf")
    Drawn(10, 10, kinds=(1, 0, 0)).mask().plot(tmp_path / "empty.png")


def test_plotting_alone_needs_matplotlib():
    code = "import sys; import sparse_fmha; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(drawn(), st.integers(0, 1 << 20), st.booleans(), st.booleans(), st.booleans())
def test_intersection(case, seed, one_batch, one_head, causal):
    other = Drawn(
        *case.sizes,
        1 if one_batch else case.batch,
        1 if one_head else case.heads,
        causal,
        case.kinds[::-1],
        seed,
    )
    both = case.mask() & other.mask()
    both.validate()
    assert both.causal is (case.causal or causal)
    assert both.to_dense().equal(case.dense() & other.dense())
    full = BlockMask.from_blocks(other.tensors()[0] > 0, *case.sizes, causal=causal)
    assert (full & case.mask()).to_dense().equal(full.to_dense() & case.dense())
    assert (full & full).partial_counts is None
    third = Drawn(*case.sizes, causal=case.causal, seed=seed + 1)
    several = BlockMask.intersection(third.mask(), case.mask(), full, other.mask())
    several.validate()
    expected = third.dense() & case.dense() & full.to_dense() & other.dense()
    assert several.to_dense().equal(expected)
    assert BlockMask.intersection(case.mask()).to_dense().equal(case.dense())
    assert third.mask().intersection(case.mask(), full, other.mask()).to_dense().equal(expected)
    assert case.mask().intersection().to_dense().equal(case.dense())


def test_from_dense_of_fewer_dimensions():
    visible = torch.rand(2, 3, 150, 200) < 0.5
    assert BlockMask.from_dense(visible[1, 2]).to_dense().equal(visible[1:, 2:])
    assert BlockMask.from_dense(visible[1]).to_dense().equal(visible[1:])
    for wrong in (visible[0, 0, 0], visible[None]):
        with pytest.raises(ValueError, match=r"visible must have .*\[q_len, kv_len\].*, got .*"):
            BlockMask.from_dense(wrong)


def test_density_of_what_causality_leaves():
    """Four of the ten blocks on and below the diagonal of 4 x 4."""
    blocks = torch.eye(4, dtype=torch.bool)[None, None]
    causal = BlockMask.from_blocks(blocks, 512, 512, causal=True)
    assert (causal.block_density, causal.reachable_block_density) == (0.25, 0.4)
    assert "25.0% of blocks listed (40.0% of those that causality leaves), causal" in repr(causal)
    others = BlockMask.from_blocks(~blocks, 512, 512)
    beyond = BlockMask(others.counts, others.indices, 512, 512, causal=True)
    assert beyond.reachable_block_density == 0.6
    both = BlockMask.from_blocks(blocks, 512, 512)
    assert both.reachable_block_density == both.block_density == 0.25
    assert "causality" not in repr(both)
    empty = BlockMask.from_blocks(blocks[:, :, :0, :0], 0, 0, causal=True)
    assert empty.reachable_block_density == 0
