"""Products for scores, and the places of the largest ones, as a GPU computes them."""

import pytest
import torch

from sparse_fmha.selection import largest, top_k_blocks, top_k_indices
from sparse_fmha.selection.products import bf16_parts, key_operand, products_by_key


def test_three_parts_are_all_of_fp32(randn):
    x = randn(1000) * torch.tensor([1e-20, 1.0, 1e20, -3.0]).repeat(250)
    parts = bf16_parts(x)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert sum(part.double() for part in parts).equal(x.double())


@pytest.mark.parametrize(
    ("dtype", "key_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_operands_of_a_gpu(randn, dtype, key_dtype):
    """The operands it has there, multiplied here; on no device their shapes alone."""
    q = randn(2, 5, 6, 16).to(dtype)
    k = randn(2, 9, 2, 16, seed=1).to(key_dtype)
    there = key_operand(k.to("meta"), dtype)
    keys = k.permute(0, 2, 3, 1)
    in_parts = (dtype, key_dtype) == (torch.bfloat16, torch.float32)
    keys = torch.cat(bf16_parts(keys), 2) if in_parts else keys.to(there.dtype)
    assert there.shape == keys.shape
    assert there.dtype == (torch.float32 if dtype != key_dtype and not in_parts else dtype)
    made = products_by_key(q, keys).mT
    heads = k.double().repeat_interleave(3, 2)
    expected = torch.einsum("blhd,bmhd->bhlm", q.double(), heads).view(2, 2, 15, 9)
    torch.testing.assert_close(made, expected.float(), rtol=1e-6, atol=1e-6)
    on_gpu = products_by_key(q.to("meta"), there).mT
    assert (on_gpu.shape, on_gpu.dtype) == (made.shape, torch.float32)


def test_products_of_fp32(randn):
    q, k = randn(2, 5, 6, 16), randn(2, 9, 2, 16, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        made = products_by_key(q.to(dtype), key_operand(k, dtype)[..., 2:7]).mT
        own = q.to(dtype).double(), k.double().repeat_interleave(3, 2)[:, 2:7]
        expected = torch.einsum("blhd,bmhd->bhlm", *own).view(2, 2, 15, 5)
        torch.testing.assert_close(made, expected.float())
    assert key_operand(k.to("meta"), torch.float16).dtype == torch.float32


def first_largest(row, k):
    there = [i for i, score in enumerate(row.tolist()) if score > -torch.inf]
    return sorted(sorted(there, key=lambda i: (-row[i], i))[:k])


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize(("n", "k"), [(640, 10), (643, 9), (64, 1), (100, 20), (7, 7)])
@pytest.mark.parametrize("kind", ["ties", "normal", "few", "nan"])
def test_places(randn, monkeypatch, n, k, kind, looks):
    scores = randn(3, 4, n)
    if kind == "ties":
        scores = scores.round()
    if kind == "few":
        scores = scores.masked_fill(torch.arange(n) % (n // 3) > 0, -torch.inf)
    if kind == "nan":
        scores[0, 1] = torch.nan
        scores[2, :, ::3] = torch.nan if looks else -torch.inf
    if not looks:
        monkeypatch.setattr(largest, "looks", lambda _: False)
    found = largest.places(scores, k).flatten(0, 1).tolist()
    for row, places in zip(scores.flatten(0, 1), found, strict=True):
        assert sorted(p for p in places if p >= 0) == first_largest(row, k)
    if 4 * k <= n:
        if not looks:  # then NaN is dropped before
            scores[1, :, 1::2] = torch.nan
        counts, indices = largest.largest(scores.flatten(0, 1), k)
        for row, count, places in zip(scores.flatten(0, 1), counts, indices, strict=True):
            expected = first_largest(row, k)
            assert places.tolist() == expected + [-1] * (k - len(expected))
            assert int(count) == len(expected)


def test_lists_on_a_gpu_are_of_groups():
    scores = torch.empty(2, 6400, device="meta")
    assert largest.applies(scores, 100)
    assert not largest.applies(scores, 101)
    counts, indices = top_k_indices(scores, 100)
    assert (counts.shape, indices.shape) == ((2,), (2, 100))
    assert top_k_blocks(scores, 100).shape == scores.shape
