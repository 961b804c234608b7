"""Token-level top-k: against the definition, token by token."""

import sys

import pytest
import torch

import sparse_fmha
from sparse_fmha.patterns import token_top_k, token_top_k_mask


def expected(scores, keys, q_len, local, first, block_q, range_size):
    """Bool [B, H, q_len, kv_len] by plain loops."""
    batch, heads, groups, kv_len = scores.shape
    seen = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b, h, g in torch.cartesian_prod(*map(torch.arange, (batch, heads, groups))).tolist():
        rows = range(g * block_q, min((g + 1) * block_q, q_len))
        at = rows[0] + kv_len - q_len
        begin = max(0, at - local) // range_size * range_size
        row = scores[b, h, g].tolist()
        taken = sorted(range(begin), key=lambda j: (j >= first, -row[j], j))[:keys]
        taken = [j for j in taken if j < first or row[j] > float("-inf")]
        for i in rows:
            own = i + kv_len - q_len
            seen[b, h, i, [j for j in (*taken, *range(begin, own + 1)) if j <= own]] = True
    return seen


@pytest.mark.parametrize(
    ("q_len", "kv_len", "keys", "local", "first", "block_q", "range_size"),
    [
        (300, 300, 20, 64, 0, 64, 64),
        (300, 300, 20, 0, 4, 128, 64),
        (200, 333, 50, 100, 10, 64, 128),
        (333, 500, 0, 30, 0, 192, 64),
        (100, 100, 500, 10, 3, 64, 64),
        (1, 400, 7, 128, 1, 64, 64),
    ],
)
def test_the_definition(q_len, kv_len, keys, local, first, block_q, range_size):
    groups = -(-q_len // block_q)
    scores = torch.randn(2, 3, groups, kv_len, generator=torch.Generator().manual_seed(0))
    scores[:, 1, :, ::5] = -torch.inf
    scores[:, 2] = scores[:, 2].round()  # ties
    sizes = dict(local=local, first=first, block_q=block_q, range_size=range_size)
    mask = token_top_k_mask(scores, keys, q_len, **sizes)
    mask.validate()
    assert mask.to_dense().equal(expected(scores, keys, q_len, *sizes.values()))


@pytest.mark.parametrize("q_len", [200, 130])
def test_scores_of_mean_queries(q_len, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, q_len, 4, 16, generator=generator)
    k = torch.randn(2, 260, 2, 16, generator=generator)
    means = torch.stack([part.mean(1) for part in q.split(64, 1)], 2)  # [B, Hq, groups, D]
    scores = means @ k.permute(0, 2, 3, 1).repeat_interleave(2, 1)
    wanted = expected(scores, 30, q_len, 20, 2, 64, 64)
    assert token_top_k(q, k, 30, local=20, first=2).to_dense().equal(wanted)
    monkeypatch.setattr(sys.modules["sparse_fmha.patterns.token_top_k"], "HELD", 300)
    assert token_top_k(q, k, 30, local=20, first=2).to_dense().equal(wanted)


def test_scores_of_keys_alone():
    scores = torch.randn(1, 2, 1, 300, generator=torch.Generator().manual_seed(2))
    mask = token_top_k_mask(scores, 16, 300, block_q=128)
    assert mask.counts.shape == (1, 2, 3)
    wide = scores.expand(-1, -1, 3, -1)
    assert mask.to_dense().equal(expected(wide, 16, 300, 128, 0, 128, 64))


def test_attention_with_all_keys_is_causal_attention():
    q, k, v = (
        torch.randn(1, 200, 2, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)
    )
    mask = token_top_k(q, k, 200)
    torch.testing.assert_close(
        sparse_fmha.stripe_attention(q, k, v, mask), sparse_fmha.attention(q, k, v, causal=True)
    )


def test_nothing():
    q = torch.randn(1, 0, 2, 16)
    assert token_top_k(q, torch.randn(1, 5, 2, 16), 3).to_dense().shape == (1, 2, 0, 5)
    assert token_top_k(torch.randn(0, 9, 2, 16), torch.randn(0, 9, 2, 16), 3).counts.shape[0] == 0


Q = torch.zeros(1, 9, 2, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: token_top_k_mask(s, -1, 100), ValueError, "keys must be at least 0, got -1"),
        (
            lambda s: token_top_k_mask(s, 5, 100, local=-3),
            ValueError,
            "local must be at least 0, got -3",
        ),
        (
            lambda s: token_top_k_mask(s, 5, 100, first=0.5),
            TypeError,
            "first must be an int, got 0.5",
        ),
        (
            lambda s: token_top_k_mask(s, 5, 101),
            ValueError,
            "k must have at least the 101 tokens of q, got 100",
        ),
        (
            lambda s: token_top_k_mask(s, 5, 64, block_q=64),
            ValueError,
            "scores must have 1 or 1 groups, for 64 queries in groups of 64, got 2",
        ),
        (
            lambda s: token_top_k_mask(s[0], 5, 100),
            ValueError,
            r"scores must have .*, got .*\[1, 2, 100\]",
        ),
        (
            lambda s: token_top_k_mask(s.long(), 5, 100),
            TypeError,
            "scores must have .*dtype.*, got torch.int64",
        ),
        (
            lambda s: token_top_k_mask(s, 5, 100, block_q=70),
            ValueError,
            "block_q must be a multiple of 64 from 64 to 2048, got 70",
        ),
        (
            lambda s: token_top_k(Q, Q[:, :5], 5),
            ValueError,
            "k must have at least the 9 tokens of q, got 5",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(1, 1, 2, 100))
