"""SSA against its definition, token by token."""

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import block_sparse_attention, patterns, reference
from sparse_fmha.masks import block_lists


def definition(q, k, blocks, block, scale):
    """Bool [B, Hq, Lq, Lkv] by loops over tokens and key heads."""
    (batch, q_len, heads, _), (kv_len, heads_kv) = q.shape, k.shape[1:3]
    q, k, group = q.double(), k.double(), heads // heads_kv
    seen = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads_kv):
            own_heads = slice(h * group, (h + 1) * group)
            means = torch.stack([part.mean(0) for part in k[b, :, h].split(block)])
            for i in range(max(0, q_len - kv_len), q_len):
                at = i + kv_len - q_len
                scores = scale * q[b, i, own_heads] @ means.T  # [G, nK]
                whole = (at + 1) // block
                lse = scores[:, :whole].logsumexp(1) if whole else torch.zeros(group)
                weights = (scores - lse[:, None]).exp().sum(0).tolist()
                order = sorted(range(at // block), key=lambda j: (-weights[j], j))
                for j in [*order[: blocks - 1], at // block]:
                    seen[b, own_heads, i, j * block : min((j + 1) * block, at + 1)] = True
    return seen


@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "blocks", "block", "block_q"),
    [
        (200, 200, (4, 2), 4, 16, 64),
        (130, 301, (4, 1), 3, 16, 128),
        (150, 150, (2, 2), 1, 32, 64),
        (90, 70, (2, 1), 50, 16, 64),
    ],
)
def test_the_definition(randn, agrees, q_len, kv_len, heads, blocks, block, block_q):
    q = 2 * randn(2, q_len, heads[0], 16)
    k, v = (randn(2, kv_len, heads[1], 16, seed=seed) for seed in (1, 2))
    mask = patterns.ssa(q, k, blocks=blocks, block=block, block_q=block_q)
    mask.validate()
    visible = definition(q, k, blocks, block, 0.25)
    assert mask.to_dense().expand(-1, heads[0], -1, -1).equal(visible)
    agrees(*block_sparse_attention(q, k, v, mask, return_lse=True), q, k, v, visible)
    again = patterns.ssa(q, k, blocks=blocks, block=block, block_q=block_q, scale=0.25)
    assert again.partial_bits.equal(mask.partial_bits)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_equal_scores_and_one_query_block_at_a_time(monkeypatch, block):
    generator = torch.Generator().manual_seed(block)
    q, k = (torch.randint(-1, 2, (1, 400, 2, 16), generator=generator).float() for _ in "qk")
    k = k[:, torch.arange(400) % (2 * block)]  # blocks repeat, so many scores are equal
    mask = patterns.ssa(q, k, blocks=3, block=block)
    mask.validate()
    assert mask.to_dense().equal(definition(q, k, 3, block, 0.25))

    def one_by_one(rows, *_, **__):
        return [slice(row, row + 1) for row in range(rows)]

    monkeypatch.setattr(block_lists, "chunks", one_by_one)
    again = patterns.ssa(q, k, blocks=3, block=block)
    assert again.to_dense().equal(mask.to_dense())
    # A list that is too long loses its last blocks.
    short = patterns.ssa(q, k, blocks=3, block=block, width=1)
    assert short.partial_counts.equal(mask.partial_counts.clamp(max=1))
    there = (short.partial_counts > 0)[..., None]
    assert short.partial_indices[there].equal(mask.partial_indices[..., :1][there])
    assert short.partial_bits[there].equal(mask.partial_bits[..., :1, :, :][there])


def test_a_query_of_nan_sees_its_own_block(randn):
    q, k = randn(1, 200, 2, 16), randn(1, 200, 1, 16, seed=1)
    q[0, 150] = torch.nan
    seen = patterns.ssa(q, k, blocks=4).to_dense()[0, 0]
    assert seen[150].nonzero().flatten().tolist() == list(range(144, 151))


def test_blocks_that_all_tokens_choose_are_full(randn):
    q, k = randn(1, 256, 2, 16), randn(1, 256, 1, 16)
    k[:, 16:32] = 100 * q[:, :1, :1]
    q = q[:, :1].expand(-1, 256, -1, -1)
    mask = patterns.ssa(q, k, blocks=3)
    assert 1 in mask.indices[0, 0, 3, : mask.counts[0, 0, 3]]
    assert patterns.ssa(q, k, blocks=3, width=1).partial_indices.shape[-1] == 1


def test_both_streams_train(randn):
    q = randn(1, 150, 4, 16, dtype=torch.float64).requires_grad_()
    k, v = (randn(1, 150, 2, 16, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2))
    mask = patterns.ssa(q, k, blocks=3)
    streams = patterns.ssa_streams(q, k, v, mask)
    full, _ = reference.attention(q, k, v, reference.causal_mask(150, 150))
    sparse, _ = reference.attention(q, k, v, definition(q.detach(), k.detach(), 3, 16, 0.25))
    torch.testing.assert_close(streams.full, full)
    torch.testing.assert_close(streams.sparse, sparse)

    def distance(a, b):
        gap = (a - b.detach()).abs()
        return torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()

    loss = distance(full, sparse) + distance(sparse, full)
    torch.testing.assert_close(streams.alignment, loss)
    made = torch.autograd.grad(streams.alignment + streams.sparse.sum(), (q, k, v))
    expected = torch.autograd.grad(loss + sparse.sum(), (q, k, v))
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("batch", "heads"), [(1, (4, 2)), (2, (6, 3)), (2, (4, 1)), (2, (2, 2))])
def test_attention_with_lists_for_key_heads(randn, batch, heads):
    q = randn(batch, 200, heads[0], 16, dtype=torch.float64).requires_grad_()
    k, v = (
        randn(batch, 230, heads[1], 16, dtype=torch.float64, seed=s).requires_grad_()
        for s in (1, 2)
    )
    out = patterns.ssa_attention(q, k, v, blocks=4, scale=0.3)
    visible = definition(q.detach(), k.detach(), 4, 16, 0.3)
    expected, _ = reference.attention(q, k, v, visible, scale=0.3)
    torch.testing.assert_close(out, expected)
    made = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for ours, theirs in zip(made, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_the_host(randn):
    q, k = randn(1, 1024, 4, 16), randn(1, 1024, 2, 16)
    with Watch() as watch:
        mask = patterns.ssa(q, k, width=40)
    mask.validate()
    assert watch.largest <= 1 << 20  # a slice of scores; the bitmasks are smaller
    on_meta = patterns.ssa(q.to("meta"), k.to("meta"), width=40)
    assert on_meta.partial_bits.shape == mask.partial_bits.shape


Q = torch.zeros(1, 9, 2, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"blocks": 0}, ValueError, "blocks must be at least 1, got 0"),
        ({"blocks": 1.5}, TypeError, r"blocks must be an int, got 1\.5"),
        ({"block": 24}, ValueError, "block_kv must be 16, 32, 64 or 128, got 24"),
        ({"block_q": 32}, ValueError, "block_q must be 64 or 128, got 32"),
        ({"width": -1}, ValueError, "width must be at least 0, got -1"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        patterns.ssa(Q, Q, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: patterns.ssa_attention(Q, Q, Q[:, :5]),
            ValueError,
            r"v must have k's shape but for the head dim, \[1, 9, 2, 16\], got \[1, 5, 2, 16\]",
        ),
        (
            lambda: patterns.ssa_attention(Q, Q[..., :1].expand(1, 9, 2, 16), Q),
            ValueError,
            "k must have stride 1 in its last dimension, got 0",
        ),
        (
            lambda: patterns.ssa_attention(Q, Q, Q, blocks=0),
            ValueError,
            "blocks must be at least 1, got 0",
        ),
    ],
)
def test_errors_of_attention(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_outputs_of_two_shapes():
    with pytest.raises(
        ValueError, match=r"sparse must have the shape of full, \[1, 9, 2, 16\], got \[9, 2, 16\]"
    ):
        patterns.ssa_alignment(Q, Q[0])
