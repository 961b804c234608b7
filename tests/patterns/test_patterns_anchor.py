"""AnchorAttention against its definition, token by token."""

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import reference
from sparse_fmha.patterns.anchor import anchor_attention
from sparse_fmha.selection import pooling


def definition(q, k, theta, step, block, scale):
    """Bool [B, H, L, L]: the keys of each query, by loops over blocks and keys, in fp64."""
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    visible = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    size = step * block
    for b in range(batch):
        for h in range(heads):
            scores = scale * q[b, :, h].double() @ k[b, :, h // group].double().T
            for u in range(-(-length // size)):
                anchor_set = torch.zeros(length, dtype=torch.bool)
                anchor_set[:block] = True
                if u:
                    anchor_set[u * size - block : u * size] = True
                anchor_set[u * size : (u + 1) * size] = True
                kept = torch.zeros(length, dtype=torch.bool)
                for start in range(u * size, min((u + 1) * size, length), block):
                    rows = range(start, min(start + block, length))
                    anchors = [scores[i, : i + 1][anchor_set[: i + 1]].max() for i in rows]
                    anchor = torch.stack(anchors).mean()
                    mean = q[b, rows.start : rows.stop, h].double().mean(0)
                    against = scale * k[b, :, h // group].double() @ mean
                    kept |= against + theta >= anchor
                kept[:block] = False
                kept[max(0, u * size - block) :] = False
                for i in range(u * size, min((u + 1) * size, length)):
                    visible[b, h, i] = kept
                    visible[b, h, i, : i + 1] |= anchor_set[: i + 1]
    return visible


@pytest.mark.parametrize(
    ("length", "step", "block", "heads_kv", "theta"),
    [
        (700, 2, 64, 1, 2.4),
        (700, 2, 64, 2, 2.5),
        (640, 1, 64, 1, 2.5),  # superblocks of one block
        (1000, 3, 128, 2, 2.6),  # a ragged last superblock
        (512, 2, 128, 1, -50.0),  # nothing is kept
        (512, 2, 64, 1, 1e6),  # everything is
        (90, 16, 128, 1, 12.0),  # less than a block
    ],
)
def test_definition(randn, agrees, length, step, block, heads_kv, theta):
    q = randn(2, length, 2, 16, seed=1)
    k, v = (randn(2, length, heads_kv, 16, seed=s) for s in (2, 3))
    found = anchor_attention(q, k, v, theta=theta, step=step, block=block, recall=True)
    visible = definition(q, k, theta, step, block, 16**-0.5)
    agrees(found.out, found.lse, q, k, v, visible)
    size = step * block
    for u in range(-(-length // size)):
        middle = visible[:, :, u * size, block : max(block, u * size - block)]
        assert found.kept[:, :, u].equal(middle.sum(-1, dtype=torch.int32))
    _, full = reference.attention(q, k, v, reference.causal_mask(length, length)[None, None])
    torch.testing.assert_close(
        found.recall.double(), (found.lse - full).exp(), rtol=1e-4, atol=1e-5
    )
    assert found.recall.max() <= 1 + 1e-5
    if abs(theta) < 10 and length > 100:
        candidates = sum(max(0, u * size - 2 * block) for u in range(-(-length // size)))
        assert 0 < found.kept.sum() < candidates * found.kept.shape[0] * found.kept.shape[1]
    if theta == 1e6:
        assert found.recall.min() > 1 - 1e-5


def test_scale_and_width(randn, agrees):
    q, k, v = (randn(1, 600, 2, 16, seed=s) for s in range(3))
    options = {"theta": 4.0, "step": 2, "block": 64, "scale": 0.4}
    found = anchor_attention(q, k, v, **options)
    agrees(found.out, found.lse, q, k, v, definition(q, k, 4.0, 2, 64, 0.4), 0.4)
    widest = int(found.kept.max())
    assert widest > 3
    assert anchor_attention(q, k, v, **options, width=widest + 9).out.equal(found.out)
    assert anchor_attention(q, k, v, **options, width=3).kept.max() == 3


def test_few_queries_at_a_time(randn, monkeypatch):
    q, k, v = (randn(2, 700, 4, 16, seed=s)[:, :, :h] for s, h in enumerate((4, 2, 2)))
    options = {"theta": 2.5, "step": 2, "block": 64}
    expected = anchor_attention(q, k, v, **options)
    monkeypatch.setattr(pooling, "SLICE", 1000)
    found = anchor_attention(q, k, v, **options)
    assert found.kept.equal(expected.kept)
    assert found.out.equal(expected.out)


def test_neither_the_host_nor_pairs_of_tokens(monkeypatch):
    """With room for the lists given. No scores of tokens are held."""
    length, block, step = 4096, 64, 2
    q = torch.randn(1, length, 4, 16, generator=torch.Generator().manual_seed(0))
    k = q[:, :, :2] + 1
    monkeypatch.setattr(pooling, "SLICE", 1 << 15)
    with Watch() as watch:
        found = anchor_attention(q, k, k, theta=5.0, step=step, block=block, width=300)
    assert watch.largest <= max(2 * q.numel(), 4 * block * (step + 2) * block)
    assert found.kept.sum() > 0
    assert found.kept.max() <= 300


def test_autocast_leaves_the_choice_alone(randn):
    q, k, v = (randn(1, 700, 2, 16, seed=s).bfloat16() for s in range(3))
    options = {"theta": 2.5, "step": 2, "block": 64}
    expected = anchor_attention(q, k, v, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = anchor_attention(q, k, v, **options)
    assert found.kept.equal(expected.kept)


def test_empty():
    for shape in ((0, 300, 2, 16), (1, 0, 2, 16)):
        q = torch.zeros(shape)
        assert anchor_attention(q, q, q, step=1, block=64).out.shape == q.shape


def test_errors(randn):
    q = randn(1, 100, 1, 16)
    for message, options in (
        ("block must be 64 or 128, got 32", {"block": 32}),
        ("step must be from 1 to 16 blocks of 128.*, got 17", {"step": 17}),
        ("step must be from 1 to 32 blocks of 64.*, got 0", {"step": 0, "block": 64}),
        ("theta must be finite, got nan", {"theta": float("nan")}),
    ):
        with pytest.raises(ValueError, match=message):
            anchor_attention(q, q, q, **options)
    with pytest.raises(ValueError, match="k must have the 100 tokens of q, got 99"):
        anchor_attention(q, q[:, :99], q[:, :99])
