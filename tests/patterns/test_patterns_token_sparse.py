"""Token Sparse Attention against its definition, token by token."""

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import attention, block_sparse_attention, patterns, reference


def expected_indices(q, k, tau, min_tokens, window, pool):
    """Lists of kept tokens, [B][Hq], by loops; of each batch entry for itself."""
    (batch, length, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    q, k = q.double(), k.double().repeat_interleave(group, 2)
    kept = []
    for b in range(batch):
        pooled = []
        for h in range(heads):
            sums = torch.zeros(length, dtype=torch.float64)
            for i in range(length - window, length):
                sums[: i + 1] += (k[b, : i + 1, h] @ q[b, i, h] / 4).softmax(0) / window
            row = [0.0] * (pool // 2) + sums[: length - window].tolist() + [0.0] * (pool // 2)
            pooled.append([sum(row[j : j + pool]) / pool for j in range(length - window)])
        total = [sum(column) for column in zip(*pooled, strict=True)]
        mass, dropped = 0.0, 0
        for share in sorted(value / sum(total) for value in total):
            mass += share
            dropped += mass < tau
        dropped += dropped > 0
        number = max(min_tokens, length - window - dropped)
        kept.append(
            [
                sorted(sorted(range(length - window), key=lambda j: -row[j])[:number])
                + list(range(length - window, length))
                for row in pooled
            ]
        )
    return kept


@pytest.mark.parametrize(
    ("length", "tau", "min_tokens", "window", "pool"),
    [(150, 0.2, 20, 16, 7), (100, 0.9, 40, 9, 3), (90, 1e-9, 0, 32, 1), (80, 1, 0, 5, 5)],
)
def test_which_tokens(randn, length, tau, min_tokens, window, pool):
    q, k = 2 * randn(1, length, 4, 16), randn(1, length, 2, 16, seed=1)
    options = {"tau": tau, "min_tokens": min_tokens, "window": window, "pool": pool}
    made = patterns.token_sparse_indices(q, k, **options)
    assert made.tolist() == expected_indices(q, k, *options.values())
    before = made.shape[-1] - window
    again = patterns.token_sparse_indices(q, k, **options, keep=before)
    assert again.equal(made)


def test_the_entry_that_keeps_most_decides(randn):
    q, k = 2 * randn(2, 120, 2, 16), randn(2, 120, 2, 16, seed=1)
    q[1] *= 4
    options = {"tau": 0.2, "min_tokens": 0, "window": 16, "pool": 3}
    apart = expected_indices(q, k, *options.values())
    most = max(len(rows[0]) for rows in apart)
    assert len(apart[0][0]) != len(apart[1][0])
    made = patterns.token_sparse_indices(q, k, **options)
    assert made.shape == (2, 2, most)


def test_short_inputs_keep_all(randn):
    q, k = randn(1, 100, 4, 16), randn(1, 100, 2, 16)
    for options in ({"min_tokens": 84, "window": 16}, {"window": 200}, {"tau": 0}):
        assert patterns.token_sparse_indices(q, k, **options).equal(
            torch.arange(100).expand(1, 4, -1)
        )


@pytest.fixture
def case(randn):
    q = randn(2, 90, 4, 16, dtype=torch.float64).requires_grad_()
    k, v = (randn(2, 90, 2, 16, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2))
    indices = torch.rand(2, 4, 90, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return q, k, v, indices[..., :70].sort(-1).values


def test_output_and_gradients(case):
    q, k, v, indices = case
    kept = torch.zeros(2, 4, 90, dtype=torch.bool).scatter_(-1, indices, True)
    visible = kept[..., None] & kept[..., None, :] & reference.causal_mask(90, 90)
    expected, _ = reference.attention(q, k, v, visible)
    out = patterns.token_sparse_attention(q, k, v, indices=indices)
    torch.testing.assert_close(out, expected)
    assert not out.transpose(1, 2)[~kept].any()
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_second_method_among_the_kept(case):
    q, k, v, indices = case

    def attend(q, k, v):
        mask = patterns.flexprefill_query_aware(q, k, gamma=0.3, block_q=64, block_kv=16)
        attend.mask = mask.to_dense()
        return block_sparse_attention(q, k, v, mask)

    out = patterns.token_sparse_attention(q, k, v, indices=indices, attend=attend)
    visible = torch.zeros(2, 4, 90, 90, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            own = indices[b, h]
            visible[b, h, own[:, None], own] = attend.mask[b, h]
    expected, _ = reference.attention(q, k, v, visible)
    torch.testing.assert_close(out, expected)


def test_anchor_attention_among_the_kept(case):
    """With a theta that keeps all keys it is dense attention among the kept tokens."""
    q, k, v, indices = case
    made = []

    def attend(q, k, v):
        result = patterns.anchor_attention(q, k, v, theta=1e4, step=1, block=64)
        made.append(result.kept)
        return result.out

    out = patterns.token_sparse_attention(q, k, v, indices=indices, attend=attend)
    expected = patterns.token_sparse_attention(q, k, v, indices=indices)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert made[0].shape[:2] == q.shape[::2][:2]


def test_with_a_number_the_host_is_not_asked(randn):
    q, k, v = (randn(1, 300, heads, 16) for heads in (4, 2, 2))
    with Watch():
        indices = patterns.token_sparse_indices(q, k, window=64, keep=50)
        patterns.token_sparse_attention(q, k, v, indices=indices)
    assert indices.shape == (1, 4, 114)
    assert patterns.token_sparse_attention(q, k, v).equal(attention(q, k, v, causal=True))


Q = torch.zeros(1, 9, 2, 16)
INDICES = torch.zeros(1, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: patterns.token_sparse_indices(Q, Q, tau=2),
            ValueError,
            "tau must be from 0 to 1, got 2",
        ),
        (
            lambda: patterns.token_sparse_indices(Q, Q, pool=4),
            ValueError,
            "pool must be odd, got 4",
        ),
        (
            lambda: patterns.token_sparse_indices(Q, Q, window=0),
            ValueError,
            "window must be at least 1, got 0",
        ),
        (
            lambda: patterns.token_sparse_indices(Q, Q, keep=-1),
            ValueError,
            "keep must be at least 0, got -1",
        ),
        (
            lambda: patterns.token_sparse_indices(Q, Q[:, :5]),
            ValueError,
            "k must have the 9 tokens of q, got 5",
        ),
        (
            lambda: patterns.token_sparse_attention(Q, Q, Q, indices=INDICES.int()),
            TypeError,
            r"indices must be an int64 tensor, got torch\.int32",
        ),
        (
            lambda: patterns.token_sparse_attention(Q, Q, Q, indices=INDICES[:, :1]),
            ValueError,
            r"indices must have shape \[1, 2, n\], n at most 9, got \[1, 1, 3\]",
        ),
        (
            lambda: patterns.token_sparse_attention(
                Q, Q, Q, indices=INDICES, attend=lambda q, k, v: q[:, :1]
            ),
            ValueError,
            r"attend must return shape \[1, 3, 2, 16\], got \[1, 1, 2, 16\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
