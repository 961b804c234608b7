"""The ops that choose AnchorAttention's distant keys on the GPU, against those on the CPU."""

import warnings

import pytest
import torch
from neighborhoods import DTYPES, LAYOUTS, laid_out
from poison import poisoned

from sparse_fmha.patterns.anchor import anchor_attention, distant_keys
from sparse_fmha.selection import pool_blocks

pytestmark = pytest.mark.gpu

OPS = torch.ops.sparse_fmha
DIMS = (8, 40, 64, 72, 128, 136, 256)

# Length, block, step, heads, heads of k.
CASES = [
    (700, 64, 2, 4, 2),
    (640, 64, 1, 1, 1),  # half a tile of queries, one row of means
    (1001, 128, 3, 3, 1),  # a last superblock of two blocks
    (513, 128, 1, 2, 1),  # a last block of one token
    (900, 64, 4, 5, 5),
    (2500, 64, 5, 7, 1),  # an odd number of heads of 64 queries
    (5000, 64, 32, 3, 1),
    (6000, 128, 16, 8, 2),
    (9000, 64, 16, 1, 1),  # more than one run of keys
    (384, 128, 2, 1, 1),  # no candidate
    (1, 64, 1, 1, 1),
]


def drawn(make_qkv, case, dim, dtype, batch=2):
    length, _, _, heads, heads_kv = case
    q, k, _ = make_qkv(batch, length, length, heads, heads_kv, dim, dtype)
    return q, k


def scores(rows, k):
    """fp64 `[B, H, rows, keys]` of rows `[B, H, rows, D]`."""
    group = rows.shape[1] // k.shape[2]
    return rows.double() @ k.double().repeat_interleave(group, 2).permute(0, 2, 3, 1)


def pooled(q, block, scale):
    return pool_blocks(q, block).mul_(scale).transpose(1, 2)


def thresholds(q_mean, k):
    """fp32 `[B, H, blocks]`: some scores of each list reach it, of one none and of one all."""
    found = scores(q_mean, k[:, : 1 << 12])
    least = found.quantile(0.98123, -1).float()
    least[0, 0, : least.shape[2] // 3] = torch.inf
    least[-1, -1, -1] = -torch.inf
    return least


def either_way(q_mean, k, least, block, step, words):
    """Bits `[B, H, superblocks, words]` of the keys whose score is the threshold but for rounding.

    The means are two numbers of k's dtype, and sums are fp32.
    """
    rounding = max((torch.finfo(k.dtype).eps / 2) ** 2, 2**-20)
    size = scores(q_mean.abs(), k.abs()) * rounding + 1e-30
    near = (scores(q_mean, k) - least.double()[..., None]).abs() <= size
    near = near[..., block : block + 32 * words]
    near = torch.nn.functional.pad(near, (0, 32 * words - near.shape[-1]))
    return torch.stack([part.any(2) for part in near.split(step, 2)], 2)


def unpacked(bits):
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(-2)


def check_means(q, k, block, step, scale):
    with poisoned():
        found = OPS.anchor_means(q, k, block, step, scale)
    expected = OPS.anchor_means(q.cpu(), k.cpu(), block, step, scale)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=2e-5)


def check_keys(q_mean, k, least, block, step):
    with poisoned():
        bits, counts = OPS.anchor_keys(q_mean, k, least, block, step)
    expected, _ = OPS.anchor_keys(q_mean.cpu(), k.cpu(), least.cpu(), block, step)
    assert bits.shape == expected.shape
    assert counts.equal(unpacked(bits).sum(-1, dtype=torch.int32))
    free = either_way(q_mean, k, least, block, step, bits.shape[-1])
    differ = unpacked(bits) != unpacked(expected.to(bits.device))
    assert not (differ & ~free).any(), f"{int((differ & ~free).sum())} bits differ"
    assert free.sum() <= 20 + 0.02 * counts.sum()
    return bits, counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(make_qkv, case, dtype):
    _, block, step, *_ = case
    q, k = drawn(make_qkv, case, 128, dtype)
    for scale in (0.09, -0.2):
        check_means(q, k, block, step, scale)
    q_mean = pooled(q, block, 0.09)
    _, counts = check_keys(q_mean, k, thresholds(q_mean, k), block, step)
    assert counts.sum() > 0 or case in CASES[-2:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(make_qkv, dim, dtype):
    for case in (CASES[0], CASES[4], CASES[7]):
        _, block, step, *_ = case
        q, k = drawn(make_qkv, case, dim, dtype, batch=1)
        check_means(q, k, block, step, dim**-0.5)
        q_mean = pooled(q, block, dim**-0.5)
        check_keys(q_mean, k, thresholds(q_mean, k), block, step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e4, 1e12])
def test_means_of_any_size(make_qkv, size, dtype):
    """The means are fp32: also those that fp16 has no numbers for."""
    q, k = drawn(make_qkv, CASES[0], 64, dtype)
    q_mean = pooled(q, 64, size)
    check_keys(q_mean, k, thresholds(q_mean, k), 64, 2)


@pytest.mark.parametrize("words", [0, 1, 40, 256, 700])
def test_columns(cuda, words):
    generator = torch.Generator().manual_seed(words)
    drawn = torch.rand(2, 3, 5, 32 * words, generator=generator)
    shares = torch.tensor([0, 0.001, 0.1, 0.9, 1])[:, None]
    weights = 1 << torch.arange(32)
    bits = ((drawn < shares).unflatten(-1, (words, 32)) * weights).sum(-1)
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
    for width in (0, 1, 300, 32 * words, 32 * words + 5):
        with poisoned():
            found = OPS.anchor_columns(bits.to(cuda), 128, width)
        for a, b in zip(found, OPS.anchor_columns(bits, 128, width), strict=True):
            assert a.cpu().equal(b)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(make_qkv, layout):
    q, k = drawn(make_qkv, CASES[0], 40, torch.bfloat16)
    q_mean = pooled(q, 64, 1.0)
    least = thresholds(q_mean, k)
    expected = OPS.anchor_means(q, k, 64, 2, 0.2), *OPS.anchor_keys(q_mean, k, least, 64, 2)
    q, k, means = laid_out(layout, (q, k, q_mean))
    found = OPS.anchor_means(q, k, 64, 2, 0.2), *OPS.anchor_keys(means, k, least, 64, 2)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_nan_has_no_anchor(make_qkv):
    q, k = drawn(make_qkv, CASES[0], 64, torch.bfloat16)
    expected = OPS.anchor_means(q, k, 64, 2, 0.2)
    k_with_nan = k.clone()
    k_with_nan[:, 130] = torch.nan  # its own superblock alone sees it, and other keys after it
    found = OPS.anchor_means(q, k_with_nan, 64, 2, 0.2)
    assert found[..., 2:4].isnan().all()
    found[..., 2:4] = expected[..., 2:4]
    assert found.equal(expected)
    q[:, 300] = torch.nan
    found = OPS.anchor_means(q, k, 64, 2, 0.2)
    assert found[..., 4].isnan().all()
    found[..., 4] = expected[..., 4]
    assert found.equal(expected)


def test_long(make_qkv):
    """Superblocks of 2048 among 65536 tokens, of which two are checked."""
    length, block, step = 65536, 128, 16
    q, k, _ = make_qkv(1, length, length, 8, 2, 128)
    scale = 128**-0.5
    means = OPS.anchor_means(q, k, block, step, scale)
    q_mean = pooled(q, block, scale)
    least = means - 2.6
    bits, counts = OPS.anchor_keys(q_mean, k, least, block, step)
    for u in (17, 31):
        of_u = slice(u * step, (u + 1) * step)
        i = u * 2048 + 1000
        keys = torch.cat((k[:, :block], k[:, u * 2048 - block : (u + 1) * 2048]), 1)
        rows = q[:, i // block * block : (i // block + 1) * block].transpose(1, 2)
        own = scale * scores(rows, keys)
        behind = torch.arange(2048, device=q.device) + u * 2048
        ahead = behind > (torch.arange(block, device=q.device) + i // block * block)[:, None]
        own[..., 2 * block :].masked_fill_(ahead, -torch.inf)
        expected = own.amax(-1).mean(-1)
        torch.testing.assert_close(means[..., i // block].double(), expected, rtol=1e-5, atol=1e-5)
        against = scores(q_mean[:, :, of_u], k[:, block : u * 2048 - block])
        against -= least[:, :, of_u, None].double()
        kept, near = (against >= 0).any(2), (against.abs() < 1e-4).any(2)
        found = unpacked(bits[:, :, u])
        assert not found[..., kept.shape[-1] :].any()
        assert found[..., : kept.shape[-1]][~near].equal(kept[~near])
        assert 0 < counts[0, 0, u] < kept.shape[-1]


def test_attention(make_qkv, agrees):
    """Whatever is kept, rows see it; with all keys kept it is causal attention."""
    q, k, v = make_qkv(1, 3000, 3000, 4, 2, 128)
    found = anchor_attention(q, k, v, theta=1e6, step=4, recall=True)
    agrees(found.out, found.lse, q, k, v, causal=True)
    assert found.recall.min() > 0.99
    options = {"theta": 3.0, "step": 4, "recall": True}
    here = anchor_attention(q, k, v, **options)
    there = anchor_attention(q.cpu(), k.cpu(), v.cpu(), **options)
    assert (here.kept.cpu() - there.kept).abs().max() <= 5
    torch.testing.assert_close(here.recall.cpu(), there.recall, rtol=0, atol=2e-2)


def test_who_waits(make_qkv):
    """With a width no one waits for the device, without one there is one wait."""
    q, k = drawn(make_qkv, (9000, 128, 4, 4, 2), 128, torch.bfloat16, batch=1)
    expected, counts = distant_keys(q, k, 3.0, 4, 128, 0.1, None)
    width = expected.shape[-1]
    assert width == int(counts.max()) > 0
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        columns, _ = distant_keys(q, k, 3.0, 4, 128, 0.1, width)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            distant_keys(q, k, 3.0, 4, 128, 0.1, None)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert columns.equal(expected)
    assert len(waits) == 1


def test_graph(make_qkv):
    """Captured once, replayed with other tensors."""
    case = 3000, 128, 2, 4, 2
    q, k = drawn(make_qkv, case, 64, torch.bfloat16, batch=1)
    arguments = 3.0, 2, 128, 0.125, 700
    distant_keys(q, k, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = distant_keys(q, k, *arguments)
    for seed in (5, 6):
        new_q, new_k, _ = make_qkv(1, 3000, 3000, 4, 2, 64, seed=seed)
        q.copy_(new_q)
        k.copy_(new_k)
        graph.replay()
        for a, b in zip(captured, distant_keys(q, k, *arguments), strict=True):
            assert a.equal(b)
        assert captured[1].sum() > 0


def test_the_same_bits_again(make_qkv):
    q, k = drawn(make_qkv, CASES[7], 128, torch.bfloat16)
    first = distant_keys(q, k, 3.0, 16, 128, 0.1, None)
    for _ in range(3):
        for a, b in zip(distant_keys(q, k, 3.0, 16, 128, 0.1, None), first, strict=True):
            assert a.equal(b)


def test_opcheck(make_qkv):
    q, k = drawn(make_qkv, CASES[0], 40, torch.bfloat16)
    torch.library.opcheck(OPS.anchor_means, (q, k, 64, 2, 0.25))
    q_mean = pooled(q, 64, 0.25)
    least = thresholds(q_mean, k)
    torch.library.opcheck(OPS.anchor_keys, (q_mean, k, least, 64, 2))
    bits, _ = OPS.anchor_keys(q_mean, k, least, 64, 2)
    torch.library.opcheck(OPS.anchor_columns, (bits, 64, 9))


def test_errors(make_qkv):
    q, k = drawn(make_qkv, CASES[0], 64, torch.bfloat16)
    q_mean = pooled(q, 64, 1.0)
    least = thresholds(q_mean, k)
    for message, call in (
        (
            "q must have .*dtype.*, got Float",
            lambda: OPS.anchor_means(q.float(), k.float(), 64, 2, 1.0),
        ),
        (
            "k must have .*dtype.*, got Double",
            lambda: OPS.anchor_keys(q_mean, k.double(), least, 64, 2),
        ),
        ("q_mean must be on k's device", lambda: OPS.anchor_keys(q_mean.cpu(), k, least, 64, 2)),
        ("least must be on q's device", lambda: OPS.anchor_keys(q_mean, k, least.cpu(), 64, 2)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(TypeError, match=r"q must have .*dtype.*, got torch\.float32"):
        anchor_attention(q.float(), k.float(), k.float())


def test_keys_that_are_not_aligned(make_qkv):
    q, k = drawn(make_qkv, CASES[0], 64, torch.bfloat16)
    q_mean = pooled(q, 64, 1.0)[..., :56]
    least = thresholds(q_mean, k[..., 4:60])
    expected = OPS.anchor_keys(q_mean, k[..., 4:60].contiguous(), least, 64, 2)
    found = OPS.anchor_keys(q_mean, k[..., 4:60], least, 64, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_current_stream(make_qkv):
    """The tensors arrive late, on a side stream that nothing else waits for."""
    q, k = drawn(make_qkv, CASES[7], 128, torch.bfloat16)
    arguments = 3.0, 16, 128, 0.1, 500
    expected = distant_keys(q, k, *arguments)
    late_q, late_k = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late_q.copy_(q)
        late_k.copy_(k)
        found = distant_keys(late_q, late_k, *arguments)
        assert not side.query(), "the call waited for the stream"
    side.synchronize()
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
