"""MMInference's grid heads against their definition, token by token."""

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import patterns, reference
from sparse_fmha.patterns.mminference_grid import GridLines


def lines_by_loops(q, k, strides, last, slack=0.25):
    batch, q_len, heads, _ = q.shape
    kv_len, group = k.shape[1], heads // k.shape[2]
    best = torch.zeros(2, batch, heads, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            sums = torch.zeros(kv_len, dtype=torch.float64)
            for i in range(max(0, q_len - last), q_len):
                own = i + kv_len - q_len + 1
                scores = k[b, :own, h // group].double() @ q[b, i, h].double() / 4
                sums[:own] += scores.softmax(0)
            means = {(s, p): -sums[p::s].mean() for s in strides for p in range(s)}
            found = min(means, key=means.get)
            near = [at for at in means if -means[at] >= (1 - slack) * -means[found]]
            parts = [at for at in near if found[0] % at[0] == 0 and at[0] < found[0]]
            if parts:
                least = min(at[0] for at in parts)
                found = min((at for at in means if at[0] == least), key=means.get)
            best[:, b, h] = torch.tensor(found)
    return best


def definition(lines, q_len, kv_len):
    stride, phase = (part[..., None, None] for part in lines)
    at = torch.arange(q_len)[:, None] + kv_len - q_len
    key = torch.arange(kv_len)
    on = (key % stride == phase) | (at % stride == phase)
    return on & (key <= at)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "strides", "block_q"),
    [
        (300, 300, [7, 24, 33], 64),
        (200, 333, [48, 50], 128),
        (150, 150, [2, 1], 64),
        (250, 250, [8, 2, 4, 12, 24], 64),
        (70, 90, [90], 64),
        (5, 400, [31, 64], 1024),
    ],
)
def test_the_definition(randn, agrees, q_len, kv_len, strides, block_q):
    q, k, v = (
        randn(2, n, heads, 16, seed=s)
        for s, (n, heads) in enumerate(((q_len, 4), (kv_len, 2), (kv_len, 2)))
    )
    lines = patterns.mminference_grid_lines(2 * q, k, strides, last=20)
    assert torch.stack(lines).equal(lines_by_loops(2 * q, k, strides, 20))
    exact = patterns.mminference_grid_lines(2 * q, k, strides, last=20, slack=0)
    assert torch.stack(exact).equal(lines_by_loops(2 * q, k, strides, 20, 0))
    out = patterns.mminference_grid_attention(q, k, v, strides, lines=lines, block_q=block_q)
    visible = definition(lines, q_len, kv_len)
    _, lse = reference.attention(q, k, v, visible)
    agrees(out, lse.float(), q, k, v, visible)


@pytest.mark.parametrize("heads", [1, 3])
def test_planted_lines_are_found(randn, heads):
    q, k = randn(1, 600, heads, 16), randn(1, 600, 1, 16, seed=1)
    k[:, 5::36] = 4 * q.mean((1, 2), keepdim=True) + 4
    lines = patterns.mminference_grid_lines(q + 1, k, [20, 36, 50])
    assert lines.stride.tolist() == [[36] * heads]
    assert lines.phase.tolist() == [[5] * heads]
    out = patterns.mminference_grid_attention(q + 1, k, k, [20, 36, 50])
    again = patterns.mminference_grid_attention(q + 1, k, k, [36], lines=lines)
    torch.testing.assert_close(out, again)


def test_all_lines_of_a_grid_are_found(randn):
    """Every other line of a grid has the same mean; half of its stride has half of it."""
    q, k = randn(1, 700, 4, 16), randn(1, 700, 1, 16, seed=1)
    k[:, 5::36] = 3 + 0.3 * randn(1, 20, 1, 16, seed=2)
    lines = patterns.mminference_grid_lines(q + 1, k, [18, 108, 72, 36])
    assert lines.stride.tolist() == [[36] * 4]
    assert lines.phase.tolist() == [[5] * 4]
    alone = patterns.mminference_grid_lines(q + 1, k, [18, 108, 72, 36], slack=0)
    assert (alone.stride > 36).any()


def test_each_head_has_its_own(randn):
    q, k = randn(2, 130, 2, 16), randn(2, 130, 1, 16, seed=1)
    lines = GridLines(torch.tensor([[9, 40]]), torch.tensor([[8, 0]]))
    out = patterns.mminference_grid_attention(q, k, k, [9, 40], lines=lines)
    expected, _ = reference.attention(q, k, k, definition(lines, 130, 130))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_without_the_host(randn):
    q, k = randn(1, 1024, 4, 16), randn(1, 1024, 2, 16)
    with Watch() as watch:
        patterns.mminference_grid_attention(q, k, k, [32, 60])
    assert watch.largest < 1024 * 1024 // 2


Q = torch.zeros(1, 9, 2, 16)
LINES = GridLines(torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: patterns.mminference_grid_lines(Q, Q, []),
            ValueError,
            "strides must have at least one entry, got none",
        ),
        (
            lambda: patterns.mminference_grid_lines(Q, Q, [0]),
            ValueError,
            r"strides\[0\] must be at least 1, got 0",
        ),
        (
            lambda: patterns.mminference_grid_lines(Q, Q, [10]),
            ValueError,
            "strides must be at most the 9 tokens of k, got 10",
        ),
        (
            lambda: patterns.mminference_grid_lines(Q, Q, [3], slack=1.5),
            ValueError,
            r"slack must be from 0 to 1, got 1\.5",
        ),
        (
            lambda: patterns.mminference_grid_lines(Q, Q[:, :5], [3]),
            ValueError,
            "k must have at least the 9 tokens of q, got 5",
        ),
        (
            lambda: patterns.mminference_grid_attention(
                Q, Q, Q, [3], lines=GridLines(LINES.stride, LINES.phase[:, :1])
            ),
            ValueError,
            r"lines\.phase must have shape \[1 or 1, 2\], one for both, got \[1, 1\]",
        ),
        (
            lambda: patterns.mminference_grid_attention(
                Q, Q, Q, [3], lines=GridLines(LINES.stride.int(), LINES.phase)
            ),
            TypeError,
            r"lines\.stride must be an int64 tensor, got torch\.int32",
        ),
        (
            lambda: patterns.mminference_grid_attention(Q, Q, Q, [3], block_q=100),
            ValueError,
            "block_q must be a multiple of 64 from 64 to 2048, got 100",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
