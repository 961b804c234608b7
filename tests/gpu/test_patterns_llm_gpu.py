"""Patterns of language models on the GPU: what they choose on the CPU, and nobody waits."""

import pytest
import torch

from sparse_fmha import (
    BlockMask,
    attention,
    block_sparse_attention,
    decode_attention,
    patterns,
    reference,
    score_sums,
    stripe_attention,
)
from sparse_fmha.selection import reductions
from sparse_fmha.selection.products import key_operand, products

pytestmark = pytest.mark.gpu

LENGTH = 2048
BOUNDARIES = torch.arange(0, LENGTH + 1, 32)[None]
STRIDES = [36, 50, 64]

MASKS = {
    "dhsa": lambda q, k: patterns.dhsa(q, k, BOUNDARIES.to(q.device), 500),
    "dhsa_blocks": lambda q, k: patterns.dhsa_blocks(q, k),
    "flexprefill": lambda q, k: patterns.flexprefill_mask(q, k, gamma=0.3, block=64),
    "hip": lambda q, k: patterns.hip(q, k, keys=128),
    "ssa": lambda q, k: patterns.ssa(q, k),
}


def attend(q, k, v, mask):
    attention_of = block_sparse_attention if isinstance(mask, BlockMask) else stripe_attention
    return attention_of(q, k, v, mask, return_lse=True)


@pytest.fixture
def tensors(cuda, randn):
    q = randn(1, LENGTH, 8, 64, dtype=torch.bfloat16)
    return q, *(randn(1, LENGTH, 2, 64, dtype=torch.bfloat16, seed=s) for s in (1, 2))


@pytest.fixture
def nobody_waits():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MASKS)
def test_masks(tensors, agrees, name):
    q, k, v = tensors
    mask = MASKS[name](q, k)
    mask.validate()
    made, expected = mask.to_dense().cpu(), MASKS[name](q.cpu(), k.cpu()).to_dense()
    # Sums are in another order, so scores that are nearly equal may change places.
    assert (made != expected).sum() <= 0.01 * expected.sum()
    agrees(*attend(q, k, v, mask), q, k, v, visible=mask.to_dense())


@pytest.mark.parametrize("name", [name for name in MASKS if name != "dhsa"])
def test_masks_without_the_host(tensors, nobody_waits, name):
    q, k, v = tensors
    attend(q, k, v, MASKS[name](q, k))


def test_attention_of_ssa(tensors, agrees):
    q, k, v = tensors
    out = patterns.ssa_attention(q, k, v)
    _, lse = attend(q, k, v, patterns.ssa(q, k))
    agrees(out, lse, q, k, v, visible=patterns.ssa(q, k).to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_dtype", ["16 bits", torch.float32])
def test_products(cuda, randn, dtype, key_dtype):
    """Sums are in fp32: no more apart from fp64 than fp32 products are, but for their order."""
    q = randn(2, 200, 8, 128, dtype=dtype)
    k = randn(2, 300, 2, 128, seed=1, dtype=dtype if key_dtype == "16 bits" else key_dtype)
    made = products(q, key_operand(k, dtype))
    heads = k.double().repeat_interleave(4, 2)
    expected = torch.einsum("blhd,bmhd->bhlm", q.double(), heads).view(made.shape)
    assert made.dtype == torch.float32
    assert (made - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("by", ["rank", "mass"])
@pytest.mark.parametrize("causal", [False, True])
def test_levels(tensors, nobody_waits, by, causal):
    q, k, _ = tensors
    made = patterns.psa_levels(q, k, by=by, causal=causal)
    torch.cuda.set_sync_debug_mode("default")
    expected = patterns.psa_levels(q.cpu(), k.cpu(), by=by, causal=causal)
    assert (made.cpu() != expected).sum() <= 0.01 * expected.numel()


@pytest.mark.parametrize("paged", [False, True])
def test_decoding_with_hip(tensors, nobody_waits, paged):
    q, k, v = tensors
    lens = torch.full((1,), LENGTH, dtype=torch.int32, device=q.device)
    table = None
    if paged:
        table = torch.arange(LENGTH // 16, dtype=torch.int32, device=q.device)[None]
        k, v = (x.unflatten(1, (-1, 16))[0] for x in (k, v))
    found = patterns.HipSearch(1, 2, keys=128, device=q.device)
    tokens = found.step(q[:, -1:], k, lens, table)
    out = decode_attention(q[:, -1:], k, v, lens, page_table=table, tokens=tokens)
    torch.cuda.set_sync_debug_mode("default")
    own = patterns.HipSearch(1, 2, keys=128)
    there = None if table is None else table.cpu()
    wanted, _ = own.step(q[:, -1:].cpu(), k.cpu(), lens.cpu(), there)
    assert (tokens[0].cpu() != wanted).sum() <= 0.02 * wanted.numel()
    assert out.isfinite().all()


@pytest.mark.parametrize("reduce", reductions.REDUCTIONS)
def test_score_sums(tensors, reduce):
    q, k, _ = tensors
    made = score_sums(q, k, reduce=reduce, causal=True)
    expected = score_sums(q.cpu(), k.cpu(), reduce=reduce, causal=True)
    torch.testing.assert_close(made.cpu(), expected, atol=1e-5, rtol=1e-3)


def test_grid(tensors, nobody_waits):
    q, k, v = tensors
    lines = patterns.mminference_grid_lines(q, k, STRIDES)
    out = patterns.mminference_grid_attention(q, k, v, STRIDES, lines=lines)
    torch.cuda.set_sync_debug_mode("default")
    stride, phase = (part[..., None, None] for part in lines)
    at = torch.arange(LENGTH, device=q.device)
    on = (at % stride == phase) | (at[:, None] % stride == phase)
    visible = on & (at <= at[:, None])
    exact, _ = reference.attention(q, k, v, visible)
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


def test_token_sparse(tensors):
    q, k, v = tensors
    indices = patterns.token_sparse_indices(q, k, keep=700)
    out = patterns.token_sparse_attention(q, k, v, indices=indices)
    own = indices[0, 5]
    alone = attention(q[:, own, 5:6], k[:, own, 1:2], v[:, own, 1:2], causal=True)
    torch.testing.assert_close(out[:, own, 5:6], alone)


def test_heads_with_different_methods(tensors):
    q, k, v = tensors
    names = {"hip": [0, 3], "dhsa_blocks": [1, 2], "flexprefill": range(4, 8)}
    methods = [(heads, MASKS[name]) for name, heads in names.items()]
    out = patterns.per_head_attention(q, k, v, methods)
    for heads, method in methods:
        for h in heads:
            own = q[:, :, h : h + 1], *(x[:, :, h // 4 : h // 4 + 1] for x in (k, v))
            alone, _ = attend(*own, method(*own[:2]))
            different = (out[:, :, h : h + 1] - alone).abs() > 2e-2
            assert different.float().mean() < 0.05, h
