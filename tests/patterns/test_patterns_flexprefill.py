"""FlexPrefill with both branches, against its definition."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import patterns


def definition(q, k, gamma, tau, least, most, block):
    """Blocks of each head, bool [B, Hq, nQ, nK], and which heads are query-aware."""
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    shift, last = kv_len - q_len, min(block, q_len)
    rows, columns = math.ceil(q_len / block), math.ceil(kv_len / block)
    blocks = torch.zeros(batch, heads, rows, columns, dtype=torch.bool)
    aware = torch.zeros(batch, heads, dtype=torch.bool)
    forced = patterns.flexprefill_query_aware(q, k, gamma=gamma, block_q=block, block_kv=block)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, :, h * k.shape[2] // heads].double()
            own = q[b, :, h].double()
            sums = torch.zeros(2, kv_len, dtype=torch.float64)
            for i in range(q_len - last, q_len):
                at = i + shift
                weights = (keys[: at + 1] @ own[i] / 4).softmax(0) / last
                sums[0, : at + 1] += weights
                sums[1, : at + 1] += weights.flip(0)
            taken = []
            for row in sums:
                total, number = 0, 0
                for value in sorted(row.tolist(), reverse=True):
                    if total >= gamma:
                        break
                    total, number = total + value, number + 1
                number = min(max(number // block + 1, least), most)
                pools = [float(part.sum()) for part in row.split(block)]
                order = sorted(range(1, columns), key=lambda n: -pools[n])
                taken.append([0, *order][:number])
            means = torch.stack([part.mean(0) for part in keys.split(block)])
            p = (means @ own[-last:].mean(0) / 4).softmax(0)
            a = torch.stack([part.sum() for part in sums[0].split(block)])
            m = (p + a) / 2
            divergence = (p * (p / m).log()).sum() / 2 + torch.special.xlogy(a, a / m).sum() / 2
            aware[b, h] = divergence.sqrt() < tau
            if aware[b, h]:
                blocks[b, h] = forced.blocks()[b, h]
                continue
            for i in range(rows):
                for j in range(i + shift // block + 1):
                    blocks[b, h, i, j] = j in taken[0] or i + shift // block - j in taken[1]
    return blocks, aware


@pytest.mark.parametrize(
    ("q_len", "kv_len", "gamma", "tau", "least", "most", "block"),
    [
        (700, 700, 0.5, 0.11, 1, None, 64),
        (300, 556, 0.3, 0.3, 1, 2, 128),
        (450, 450, 0.9, 0, 2, None, 64),
        (500, 500, 0.2, 1, 1, None, 128),
        (60, 60, 0.9, 0.1, 1, None, 64),
    ],
)
def test_the_definition(randn, q_len, kv_len, gamma, tau, least, most, block):
    q, k = randn(2, q_len, 4, 16), randn(2, kv_len, 2, 16, seed=1)
    q[1] *= 3
    q[:, :, 2] /= 4
    k[:, 10:14] += 2 * q[:, -1:, ::2]
    options = {"gamma": gamma, "tau": tau, "min_budget": least, "max_budget": most, "block": block}
    mask = patterns.flexprefill_mask(q, k, **options)
    mask.validate()
    blocks, aware = definition(q, k, gamma, tau, least, most or 10**9, block)
    assert mask.blocks().equal(blocks)
    if 0 < tau < 1 and q_len > block:
        assert 0 < aware.sum() < aware.numel()  # both branches are seen


def test_without_the_host(randn):
    q, k = randn(1, 1024, 4, 16), randn(1, 1024, 2, 16)
    with Watch() as watch:
        mask = patterns.flexprefill_mask(q, k)
    mask.validate()
    assert watch.largest <= 4 * 128 * 1024
    assert patterns.flexprefill_mask(q[:, :0], k).counts.shape == (1, 4, 0)
    on_meta = patterns.flexprefill_mask(q.to("meta"), k.to("meta"))
    assert on_meta.indices.shape == mask.indices.shape


Q = torch.zeros(1, 200, 2, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": 2}, ValueError, "gamma must be from 0 to 1, got 2"),
        ({"tau": -1}, ValueError, "tau must be from 0 to 1, got -1"),
        ({"min_budget": 0}, ValueError, "min_budget must be at least 1, got 0"),
        ({"min_budget": 3, "max_budget": 2}, ValueError, "max_budget must be at least 3, got 2"),
        ({"block": 32}, ValueError, "block_q must be 64 or 128, got 32"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        patterns.flexprefill_mask(Q, Q, **options)


def test_lengths_that_do_not_fit():
    with pytest.raises(
        ValueError, match="k must have the 100 tokens of q and a multiple of block = 128 more, got"
    ):
        patterns.flexprefill_mask(Q[:, :100], Q)
