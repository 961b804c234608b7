"""Block masks from and to FlexAttention, which runs here without its compiler."""

import itertools

import pytest
import torch
from block_masks import Drawn, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparse_fmha import BlockMask, reference

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def flex(q, k, v, mask):
    """FlexAttention on [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


@settings(max_examples=30)
@given(drawn(), st.integers(1, 2))
def test_to_flex_is_the_same_attention(randn, case, group):
    q = randn(case.batch, case.q_len, case.heads * group, 16)
    k, v = (randn(case.batch, case.kv_len, group, 16, seed=s) for s in (1, 2))
    if group == 2 and case.heads == 2:
        k, v = k[:, :, :1], v[:, :, :1]
    mask = case.mask()
    if mask.counts.shape[1] not in (1, q.shape[2]):
        q = q[:, :, : case.heads]
        k, v = k[:, :, :1], v[:, :, :1]
    exact, lse = reference.attention(q, k, v, case.dense())
    out = flex(q, k, v, mask.to_flex())
    seen = lse > -torch.inf  # FlexAttention's rows without keys are its own affair
    torch.testing.assert_close(out.double()[seen], exact[seen], rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(drawn())
def test_there_and_back(case):
    back = BlockMask.from_flex(case.mask().to_flex())
    back.validate()
    assert back.to_dense().equal(case.dense())
    assert not back.causal


@given(drawn())
def test_the_lists_that_flex_gets(case):
    """Its compiled kernels read them, and ask the function in partial blocks alone."""
    dense, given_mask = case.dense(), case.mask().to_flex()
    shape = case.batch, case.heads, -(-case.q_len // case.block_q)
    assert given_mask.kv_num_blocks.shape == given_mask.full_kv_num_blocks.shape == shape
    for place in itertools.product(*map(range, shape)):
        rows = dense[place[:2]][place[2] * case.block_q :][: case.block_q]
        full, partial = (
            set(indices[place][: counts[place]].tolist())
            for counts, indices in (
                (given_mask.full_kv_num_blocks, given_mask.full_kv_indices),
                (given_mask.kv_num_blocks, given_mask.kv_indices),
            )
        )
        assert not full & partial
        for n, block in enumerate(rows.split(case.block_kv, 1)):
            if block.all() and case.tensors()[0][(*place, n)] == 1:
                assert n in full
            elif n in full:
                pytest.fail(f"block {n} of {place} is not full")
            assert n in full | partial or not block.any()


@pytest.mark.parametrize("batch", [1, 2])
def test_one_list_for_all_batch_entries_and_heads(randn, batch):
    case = Drawn(300, 200, 64, 32, causal=True)
    q, k, v = (randn(batch, n, 3, 16, seed=n) for n in (300, 200, 200))
    exact, lse = reference.attention(q, k, v, case.dense())
    seen = lse > -torch.inf
    out = flex(q, k, v, case.mask().to_flex()).double()
    torch.testing.assert_close(out[seen], exact[seen], rtol=1e-4, atol=1e-5)


def sliding(b, h, q, k):
    return (q - k).abs() <= 40 + 30 * h


def causal_documents(b, h, q, k):
    return (q >= k) & (q // 90 == k // 90)


def nothing(b, h, q, k):
    return (q < 0) & (k < 0)


def everything(b, h, q, k):
    return q >= 0


DOCUMENTS = torch.arange(800).view(2, 400) // torch.tensor([[70], [110]])


def documents_of_each(b, h, q, k):
    """Indexed one axis after the other, which works for scalar indices alone."""
    return DOCUMENTS[b][q] == DOCUMENTS[b][k]


def all_of_some(b, h, q, k):
    """Does not depend on the pair."""
    return h != 1


MODS = [sliding, causal_documents, nothing, everything, documents_of_each, all_of_some]
SIZES = [(300, 300), (130, 257), (5, 400)]


def dense_of(mask_mod, batch, heads, q_len, kv_len):
    if mask_mod is documents_of_each:  # the same for tensors of indices

        def mask_mod(b, h, q, k):
            return DOCUMENTS[b, q] == DOCUMENTS[b, k]

    index = [torch.arange(n) for n in (batch, heads, q_len, kv_len)]
    b, h, q, k = torch.meshgrid(*index, indexing="ij")
    return mask_mod(b, h, q, k)


@pytest.mark.parametrize("mask_mod", MODS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("blocks", [(64, 16), (64, 128), (128, 32), (128, 128)], ids=str)
def test_from_flex(mask_mod, sizes, blocks):
    given_mask = create_block_mask(mask_mod, 2, 3, *sizes, device="cpu", BLOCK_SIZE=blocks)
    mask = BlockMask.from_flex(given_mask)
    mask.validate()
    assert mask.to_dense().equal(dense_of(mask_mod, 2, 3, *sizes))


@pytest.mark.parametrize("mask_mod", MODS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_from_mask_mod(mask_mod, sizes, monkeypatch):
    from sparse_fmha.masks import flex

    expected = dense_of(mask_mod, 2, 2, *sizes)
    for pairs in (1 << 24, 70_000, 1):  # at once, some rows of blocks at a time, each on its own
        monkeypatch.setattr(flex, "SLICE", pairs)
        mask = BlockMask.from_mask_mod(mask_mod, 2, 2, *sizes, 64, 32)
        mask.validate()
        assert mask.to_dense().equal(expected)
        kinds = BlockMask.from_dense(expected, 64, 32)
        assert mask.counts.equal(kinds.counts)
        assert mask.partial_counts.equal(kinds.partial_counts)


def test_a_block_size_that_we_lack():
    given_mask = create_block_mask(everything, None, None, 256, 256, device="cpu", BLOCK_SIZE=256)
    with pytest.raises(
        ValueError, match="BLOCK_SIZE of mask must be 64 or 128 for queries and 16, 32, 64 or 128"
    ):
        BlockMask.from_flex(given_mask)


def test_errors():
    with pytest.raises(
        TypeError, match=r"mask must be a BlockMask of torch.nn.attention.flex_attention, got"
    ):
        BlockMask.from_flex(Drawn(100, 100).mask())
    for sizes, name in {(0, 100): "q_len", (100, 0): "kv_len"}.items():
        mask = BlockMask.from_dense(torch.ones(1, 1, *sizes).bool())
        with pytest.raises(ValueError, match=f"{name} must be at least 1 for FlexAttention, got 0"):
            mask.to_flex()
    for error, message, arguments in (
        (TypeError, "mask_mod must be a function .*, got 3", (3, 1, 1, 100, 100)),
        (TypeError, "heads must be an int, got 1.5", (sliding, 1, 1.5, 100, 100)),
        (ValueError, "batch must be at least 0, got -1", (sliding, -1, 1, 100, 100)),
        (
            ValueError,
            "block_q must be 64 or 128, got 32",
            (sliding, 1, 1, 100, 100, 32),
        ),
        (TypeError, "mask_mod must return torch.bool, got torch.int64", (scores, 1, 1, 100, 100)),
        (TypeError, "mask_mod must return a tensor .*, got True", (number, 1, 1, 100, 100)),
        (ValueError, r"mask_mod must return a scalar .*, got shape \[2\]", (two, 1, 1, 100, 100)),
    ):
        with pytest.raises(error, match=message):
            BlockMask.from_mask_mod(*arguments)


def number(b, h, q, k):
    return True


def scores(b, h, q, k):
    return q - k


def two(b, h, q, k):
    return torch.stack([q > k, q < k])


def test_a_mask_function_without_tokens():
    for sizes in ((0, 100), (100, 0), (0, 0)):
        mask = BlockMask.from_mask_mod(sliding, 1, 2, *sizes)
        assert mask.to_dense().shape == (1, 2, *sizes)
