"""Light Forcing against its definition, token by token."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import block_sparse_attention, patterns, reference


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(q_len, kv_len, heads=(4, 2), seed=0):
    q = normal(2, q_len, heads[0], 16, seed=seed)
    return q, *(normal(2, kv_len, heads[1], 16, seed=seed + n) for n in (1, 2))


def definition(q, k, frame, block_q, block_kv, sparsity, frames, sink, recent):
    """Bool [B, H, Lq, Lkv]."""
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[2], 2)
    count, own = kv_len // frame, (kv_len - q_len) // frame
    keep = max(1, math.ceil((1 - sparsity) * -(-kv_len // block_kv) - 1e-9))
    runs = {}  # the tokens of each frame and block
    for j in range(kv_len):
        runs.setdefault((j // frame, j // block_kv), []).append(j)
    mask = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(
        torch.arange(batch), torch.arange(heads), torch.arange(-(-q_len // block_q))
    ).tolist():
        rows = slice(r * block_q, (r + 1) * block_q)
        mean = q[b, rows, h].mean(0)
        of_frames = [
            float(mean @ k[b, n * frame : (n + 1) * frame, h].mean(0)) for n in range(count)
        ]
        seen = set(sorted(range(count), key=lambda n: -of_frames[n])[:frames])
        seen |= set(range(sink)) | set(range(max(0, own - recent), count))
        scores = {p: float(mean @ k[b, run, h].mean(0)) for p, run in runs.items() if p[0] in seen}
        for piece in sorted(scores, key=lambda p: -scores[p])[:keep]:
            mask[b, h, rows, runs[piece]] = True
    return mask


CASES = [
    # q_len, kv_len, frame, block_q, block_kv, sparsity, frames, sink, recent
    (200, 800, 100, 64, 64, 0.5, 2, 1, 1),
    (256, 1024, 128, 128, 128, 0.4, 3, 0, 0),  # frames are whole blocks
    (100, 500, 50, 64, 128, 0.3, 3, 1, 2),  # several frames in a block
    (130, 390, 130, 64, 32, 0.8, 0, 1, 0),
    (300, 300, 100, 128, 128, 0.5, 1, 1, 9),  # all frames are the chunk's own
]


@pytest.mark.parametrize("case", CASES)
def test_definition(case):
    q_len, kv_len, frame, block_q, block_kv, sparsity, frames, sink, recent = case
    q, k, v = inputs(q_len, kv_len, seed=kv_len)
    layout = patterns.LightForcingLayout(q_len, kv_len, frame, block_q=block_q, block_kv=block_kv)
    options = {"sparsity": sparsity, "frames": frames, "sink": sink, "recent": recent}
    with Watch():
        mask = patterns.light_forcing(q, k, layout, **options)
    mask.validate()
    expected = definition(q, k, frame, block_q, block_kv, **options)
    assert torch.equal(mask.to_dense(), expected)
    assert expected.any(-1).all()
    assert not expected.all()
    if kv_len == 500:
        assert mask.partial_counts.sum() > 0
    out = block_sparse_attention(q, k, v, mask)
    torch.testing.assert_close(
        out.double(), reference.attention(q, k, v, expected)[0], atol=1e-5, rtol=1e-5
    )


def test_nothing_left_out_is_dense_and_trains():
    q, k, v = (x.requires_grad_() for x in inputs(100, 300))
    layout = patterns.LightForcingLayout(100, 300, 50)
    mask = patterns.light_forcing(q, k, layout, sparsity=0.0)
    block_sparse_attention(q, k, v, mask).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, k, v))
    layout = patterns.LightForcingLayout(128, 512, 128)
    q, k, _ = inputs(128, 512)
    assert patterns.light_forcing(q, k, layout, sparsity=0.0, frames=4).to_dense().all()


def test_sparsity_of_chunks():
    q_lens, kv_lens, noise = [4, 4, 4], [4, 8, 12], [0.0, 1.0, 3.0]
    found = patterns.light_forcing_sparsity(q_lens, kv_lens, noise, base=0.9, target=0.8)
    assert found[0] == 0
    assert 0.9 - found[2] == pytest.approx(3 * (0.9 - found[1]))
    left = sum((1 - s) * a * b for s, a, b in zip(found[1:], q_lens[1:], kv_lens[1:], strict=True))
    assert left == pytest.approx(0.2 * (4 * 8 + 4 * 12))
    assert patterns.light_forcing_sparsity([4], [4], [0.0], base=0.9, target=0.8) == [0.0]


F, L = patterns.light_forcing_sparsity, patterns.LightForcingLayout
Q = normal(1, 64, 2, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: F([1, 2], [1, 2], [1.0], base=0.9, target=0.8),
            ValueError,
            "q_lens, kv_lens and noise must have the same number of entries, got 2, 2",
        ),
        (
            lambda: F([1, 2], [1, 2], [0.0, 0.0], base=0.9, target=0.8),
            ValueError,
            r"noise must have a number above 0 after the first, got \[0\.0, 0\.0\]",
        ),
        (
            lambda: F([4, 4], [4, 8], [0, 1], base=1.2, target=0.8),
            ValueError,
            r"base must be from 0 to 1, got 1\.2",
        ),
        (
            lambda: F([4, 4, 4], [4, 8, 12], [0, 0, 9], base=0.9, target=0.2),
            ValueError,
            r"which give chunk 2 -0\.2667",
        ),
        (
            lambda: L(64, 100, 64),
            ValueError,
            "kv_len must be a positive multiple of frame = 64, got 100",
        ),
        (lambda: L(128, 64, 64), ValueError, "q_len must be at most kv_len = 64, got 128"),
        (lambda: L(64, 64, 0), ValueError, "frame must be at least 1, got 0"),
        (lambda: L(64, 64, 8, block_kv=8), ValueError, "block_kv must be 16, 32, 64 or 128, got 8"),
        (
            lambda: patterns.light_forcing(Q, Q, L(64, 128, 64)),
            ValueError,
            "k must have the 128 tokens of layout, got 64",
        ),
        (
            lambda: patterns.light_forcing(Q, Q, L(64, 64, 64), sparsity=2),
            ValueError,
            "sparsity must be from 0 to 1, got 2",
        ),
        (
            lambda: patterns.light_forcing(Q, Q, L(64, 64, 64), frames=1.5),
            TypeError,
            r"frames must be an int, got 1\.5",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
