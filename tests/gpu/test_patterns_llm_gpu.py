"""Patterns of language models on the GPU: what they choose on the CPU, and nobody waits."""

import pytest
import torch

from sparse_fmha import (
    BlockMask,
    StripeMask,
    attention,
    block_sparse_attention,
    decode_attention,
    patterns,
    reference,
    row_attention,
    score_sums,
    stripe_attention,
)
from sparse_fmha.masks import block_lists
from sparse_fmha.selection import reductions, top_k_blocks
from sparse_fmha.selection.products import key_operand, products_by_key

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
    made = products_by_key(q, key_operand(k, dtype)).mT
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("listed", ["all keys", "blocks", "stripes"])
def test_listed_rows(tensors, agrees, nobody_waits, listed, causal):
    """In any order, with some that are absent; positions by a bias and thresholds."""
    q, k, v = tensors
    n = 500
    order = torch.rand(1, 8, LENGTH, device=q.device).argsort(-1)
    rows = order[..., :n].clone()
    rows[..., 7].fill_(-1)
    mask = None
    if listed == "blocks":
        chosen = torch.rand(1, 8, -(-n // 64), LENGTH // 64, device=q.device) < 0.4
        mask = BlockMask.from_blocks(chosen, n, LENGTH, 64, 64)
    elif listed == "stripes":
        shape = 1, 8, -(-n // 64), 100
        columns = torch.rand(*shape[:3], LENGTH, device=q.device).topk(100).indices.sort(-1).values
        counts = torch.full(shape[:3], 100, dtype=torch.int32, device=q.device)
        mask = StripeMask(columns.int(), counts, n, LENGTH, 64)
    out, lse = row_attention(q, k, v, rows, mask=mask, causal=causal, return_lse=True)
    torch.cuda.set_sync_debug_mode("default")
    seen = torch.ones(1, 8, n, LENGTH, dtype=torch.bool, device=q.device)
    if mask is not None:
        seen = mask.to_dense()
    if causal:
        seen = seen & (torch.arange(LENGTH, device=q.device) <= rows[..., None])
    visible = torch.zeros(1, 8, LENGTH + 1, LENGTH, dtype=torch.bool, device=q.device)
    index = torch.where(rows < 0, LENGTH, rows)[..., None].expand(-1, -1, -1, LENGTH)
    visible = visible.scatter_(2, index, seen)[:, :, :LENGTH]
    agrees(out, lse, q, k, v, visible=visible)


@pytest.mark.parametrize("window", [1, 3])
def test_pka(tensors, nobody_waits, window):
    q, k, v = (x[:, :1024] for x in tensors)
    later = tensors[1][:, 1024:], tensors[2][:, 1024:]
    spatial = [(k, v), later, (v, k)]
    out = patterns.pka_attention(q, k, v, (32, 32), spatial=spatial, window=window)
    torch.cuda.set_sync_debug_mode("default")
    near = reference.neighborhood_mask((32, 32), (window, window)).to(q.device)
    seen = torch.cat([torch.ones_like(near), near, near, near], 1)
    keys, values = (torch.cat(x, 1) for x in zip((k, v), *spatial, strict=True))
    exact, _ = reference.attention(q, keys, values, seen)
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


def test_small_tables_are_chosen_as_on_the_cpu(cuda, randn):
    """There a GPU sorts; ties and what is never taken included."""
    scores = randn(2, 3, 40, 100).mul(3).round()
    scores[..., ::9] = -torch.inf
    scores[..., 5::17] = torch.nan
    made = top_k_blocks(scores, 11)
    assert made.cpu().equal(top_k_blocks(scores.cpu(), 11))
    on_gpu, on_cpu = (block_lists.list_blocks(x, 9) for x in (made, made.cpu()))
    for own, other in zip(on_gpu, on_cpu, strict=True):
        assert own.cpu().equal(other)


def test_regions_packed(cuda, randn, agrees):
    packing = patterns.BiFormerPacking(patterns.image_regions(28, 28, 7)).to(cuda)
    q, k, v = (randn(2, 784, 4, 32, dtype=torch.bfloat16, seed=s) for s in range(3))
    mask = patterns.biformer_packed(q, k, packing, top_k=4)
    permuted = [packing.order.permute(x) for x in (q, k, v)]
    out, lse = block_sparse_attention(*permuted, mask, return_lse=True)
    agrees(out, lse, *permuted, visible=mask.to_dense())
