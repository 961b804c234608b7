"""Choices of methods on the GPU: as on the CPU, made while nobody waits; and attention by them."""

import pytest
import torch

from sparse_fmha import block_sparse_attention, patterns, reference

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
LENGTH = 1024
HEADS = {0: ("vertical_and_slash", 100, 200), 1: ("stream_llm", 64, 256), 2: ("block_sparse", 0, 0)}
HEADS |= {3: HEADS[0], 4: ("vertical_and_slash", 30, 500)}  # the others see nearly all
PAIRS = {(0, 0): "dense", (1, 1): ("top_k", 3), (1, 0): ("a_shape", 1, 2), (0, 1): "none"}


@pytest.fixture
def tensors(randn):
    q = randn(1, LENGTH, 8, 64, dtype=BF16)
    return q, *(randn(1, LENGTH, 2, 64, dtype=BF16, seed=s) for s in (1, 2))


def assert_nearly_equal(made, expected):
    """Sums are in another order, so scores that are nearly equal may change places."""
    made, expected = made.cpu(), expected.cpu()
    assert 0 < expected.sum() < expected.numel()
    assert (made != expected).sum() <= 0.01 * expected.sum()


@pytest.mark.parametrize("text", [0, 100])
def test_rectified(tensors, nobody_waits, text):
    q, k, _ = tensors
    options = {"text": text, "keep": 0.3, "block": 64}
    plan = patterns.rectified(q, k, **options)
    torch.cuda.set_sync_debug_mode("default")
    plan.mask.validate()
    expected = patterns.rectified(q.cpu(), k.cpu(), **options)
    assert_nearly_equal(plan.mask.blocks(), expected.mask.blocks())
    near = (plan.rest.cpu() - expected.rest).abs() < 1e-4
    assert near.float().mean() > 0.99
    same = near.all(-1)
    torch.testing.assert_close(plan.scale.cpu()[same], expected.scale[same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frame", [64, 32, 128])
def test_light_forcing(tensors, agrees, nobody_waits, frame):
    q, k, v = tensors
    q = q[:, -2 * frame :]
    torch.cuda.set_sync_debug_mode("default")  # layouts are made once, by the host
    layout = patterns.LightForcingLayout(2 * frame, LENGTH, frame, block_q=64, device=q.device)
    torch.cuda.set_sync_debug_mode("error")
    mask = patterns.light_forcing(q, k, layout, sparsity=0.6, frames=3)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    torch.cuda.set_sync_debug_mode("default")
    mask.validate()
    expected = patterns.light_forcing(q.cpu(), k.cpu(), layout.to("cpu"), sparsity=0.6, frames=3)
    assert_nearly_equal(mask.to_dense(), expected.to_dense())
    agrees(out, lse, q, k, v, visible=mask.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_sparsifiner(tensors, agrees, nobody_waits, dtype):
    q, k, v = (x[:, :197].contiguous() for x in tensors)
    torch.cuda.set_sync_debug_mode("default")
    torch.manual_seed(0)
    made = patterns.SparsifinerPredictor(197, 8, 64, device="cpu", dtype=dtype)
    own = patterns.SparsifinerPredictor(197, 8, 64, device=q.device, dtype=dtype)
    own.load_state_dict(made.state_dict())
    torch.cuda.set_sync_debug_mode("error")
    mask = own.mask(q.to(dtype), k.to(dtype))
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    torch.cuda.set_sync_debug_mode("default")
    visible = mask.to_dense()
    agrees(out, lse, q, k, v, visible=visible)
    seen = visible.sum(-1)
    assert seen[..., 0].eq(197).all()
    assert seen[..., 1:].eq(50).all()
    if dtype == torch.float32:  # 16 bits leave many scores equal but for roundings
        expected = made.mask(q.cpu().float(), k.cpu().float()).to_dense()
        assert_nearly_equal(visible, expected)


@pytest.mark.parametrize("keys_too", [True, False])
def test_boundaries_of_modalities(tensors, agrees, nobody_waits, keys_too):
    q, k, v = tensors
    torch.cuda.set_sync_debug_mode("default")
    modality = torch.arange(LENGTH) // 100 % 2
    order = patterns.ModalityOrder(modality, keys_too=keys_too, device=q.device)
    pairs = PAIRS if keys_too else {(1, 0): ("top_k", 3)}
    torch.cuda.set_sync_debug_mode("error")
    mask = patterns.mminference_boundary(q, k, order, pairs)
    permuted = order.permute(q, k, v)
    out, lse = block_sparse_attention(*permuted, mask, return_lse=True)
    torch.cuda.set_sync_debug_mode("default")
    mask.validate()
    expected = patterns.mminference_boundary(q.cpu(), k.cpu(), order.to("cpu"), pairs)
    assert_nearly_equal(mask.to_dense(), expected.to_dense())
    agrees(out, lse, *permuted, visible=mask.to_dense())
    # Dense patterns are causal attention in the original order.
    mask = patterns.mminference_boundary(q, k, order, {})
    out, lse = block_sparse_attention(*permuted, mask, return_lse=True)
    agrees(order.undo(out), order.undo(lse), q, k, v, causal=True)


def test_the_mix_of_minference(tensors, agrees):
    q, k, v = tensors
    out = patterns.minference_attention(q, k, v, HEADS, top_k=5)
    methods = patterns.minference_heads(HEADS, 8, LENGTH, LENGTH, top_k=5, device=q.device)
    again, lse = patterns.per_head_attention(q, k, v, methods, return_lse=True)
    assert out.equal(again)
    visible = torch.zeros(1, 8, LENGTH, LENGTH, dtype=torch.bool, device=q.device)
    for heads, method in methods:
        # As the method gets them: the heads of each pattern share one key head.
        own = q[:, :, heads], k[:, :, sorted({head // 4 for head in heads})]
        if callable(method):
            mask, there = method(*own), method(*(x.cpu() for x in own))
            assert_nearly_equal(mask.to_dense(), there.to_dense())
        else:
            mask = method
        visible[:, heads] = mask.to_dense().expand(1, len(heads), -1, -1)
    agrees(out, lse, q, k, v, visible=visible)


@pytest.mark.parametrize("threshold", [0.2, 0.8])
def test_keyword_rows(tensors, nobody_waits, threshold):
    q, k, _ = tensors
    q = 4 * q[:, :2]
    rows = patterns.keyword_rows(q, k, threshold=threshold)
    torch.cuda.set_sync_debug_mode("default")
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(4, 2)) / 8
    shares = scores.softmax(-1).mean((1, 2))
    low, high = shares.amin(1, keepdim=True), shares.amax(1, keepdim=True)
    shares = (shares - low) / (high - low)
    clear = (shares - threshold).abs() > 1e-4
    assert clear.float().mean() > 0.99
    assert rows[clear].equal((shares > threshold)[clear])
    assert rows.any()


@pytest.mark.parametrize("similarity", [None, {2: 0.3, 4: 0.2, 8: 0.1}])
def test_levels_by_similarity(tensors, nobody_waits, similarity):
    q, k, _ = tensors
    k = k + 2 * k[:, ::16].repeat_interleave(16, 1)
    options = {"by": "mass", "similarity": similarity, "text": 70, "block_kv": 64}
    made = patterns.psa_levels(q, k, **options)
    torch.cuda.set_sync_debug_mode("default")
    expected = patterns.psa_levels(q.cpu(), k.cpu(), **options)
    assert len(expected.unique()) > 2
    assert (made.cpu() != expected).sum() <= 0.01 * expected.numel()


def test_parts_of_pka_that_are_scoped(tensors, nobody_waits):
    """A subject that only the rows of a keyword see, in one softmax with the image."""
    q, k, v = tensors
    subject = tensors[1][:, :200] * 0.5, tensors[2][:, :200]
    rows = (torch.arange(LENGTH, device=q.device) // 30 % 3 == 0)[None]
    out = patterns.pka_attention(q, k, v, (32, 32), subject=subject, rows=rows)
    torch.cuda.set_sync_debug_mode("default")
    seen = torch.cat(
        [torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=q.device),
         rows[0, :, None].expand(-1, 200)], 1
    )  # fmt: skip
    keys, values = (torch.cat(x, 1) for x in zip((k, v), subject, strict=True))
    exact, _ = reference.attention(q, keys, values, seen)
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)
