"""Block masks from and to FlexAttention, which runs here without its compiler."""

import pytest
import torch
from block_masks import drawn
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


def sliding(b, h, q, k):
    return (q - k).abs() <= 40 + 30 * h


def causal_documents(b, h, q, k):
    return (q >= k) & (q // 90 == k // 90)


def nothing(b, h, q, k):
    return (q < 0) & (k < 0)


def everything(b, h, q, k):
    return q >= 0


MODS = [sliding, causal_documents, nothing, everything]
SIZES = [(300, 300), (130, 257), (5, 400)]


def dense_of(mask_mod, batch, heads, q_len, kv_len):
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
    from sparse_fmha import _block_flex

    expected = dense_of(mask_mod, 1, 2, *sizes)
    for pairs in (1 << 24, 1):  # in one slice, and each row of blocks on its own
        monkeypatch.setattr(_block_flex, "SLICE", pairs)
        mask = BlockMask.from_mask_mod(mask_mod, 1, 2, *sizes, 64, 32)
        mask.validate()
        assert mask.to_dense().equal(expected)
        kinds = BlockMask.from_dense(expected, 64, 32)
        assert mask.counts.equal(kinds.counts)
        assert mask.partial_counts.equal(kinds.partial_counts)


def test_a_block_size_that_we_lack():
    given_mask = create_block_mask(everything, None, None, 256, 256, device="cpu", BLOCK_SIZE=256)
    with pytest.raises(
        ValueError, match=r"BLOCK_SIZE \(256, 256\); queries in blocks of 64 or 128"
    ):
        BlockMask.from_flex(given_mask)
