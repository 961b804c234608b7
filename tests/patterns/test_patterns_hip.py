"""HiP's search against its definition, chunk by chunk."""

import itertools

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import patterns, stripe_attention
from sparse_fmha.masks import block_lists


def search(queries, keys, low, high, n, granule):
    """Kept chunks of keys [low, high) by loops; queries and keys [.., D] in fp64."""
    edges = [low + (high - low) * c // n for c in range(n + 1)]
    chunks = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    while any(b - a > granule for a, b in chunks):
        halves = []
        for a, b in chunks:
            middle = a + (b - a + 1) // 2 if b - a > granule else b
            halves += [part for part in ((a, middle), (middle, b)) if part[1] > part[0]]
        score = {(a, b): float((queries @ keys[a + (b - a) // 2]).max()) for a, b in halves}
        chunks = sorted(sorted(halves, key=lambda part: -score[part])[:n])
    return chunks


def definition(q, k, keys, granule, local, first, sample, block_q, size):
    """Bool [B, Hq, Lq, Lkv]."""
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    seen = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            own = k[b, :, h * k.shape[2] // heads].double()
            for start in range(0, q_len, block_q):
                stop, at = min(start + block_q, q_len), start + kv_len - q_len
                begin = max(0, at - local) // size * size
                low = min(first, begin)
                queries = q[b, start:stop:sample, h].double()
                found = search(queries, own, low, begin, keys // granule, granule)
                taken = [*range(low), *(j for a, c in found for j in range(a, c))]
                for i in range(start, stop):
                    seen[b, h, i, [*taken, *range(begin, at + i - start + 1)]] = True
    return seen


@pytest.mark.parametrize(
    ("q_len", "kv_len", "keys", "granule", "local", "first", "sample", "block_q"),
    [
        (400, 400, 32, 2, 64, 4, 2, 64),
        (200, 333, 40, 8, 0, 0, 1, 64),
        (300, 300, 21, 3, 30, 10, 5, 128),
        (130, 500, 6, 1, 64, 1, 64, 64),
        (300, 300, 512, 2, 0, 4, 2, 64),
        (40, 40, 16, 2, 128, 4, 2, 64),
    ],
)
def test_the_definition(
    randn, monkeypatch, q_len, kv_len, keys, granule, local, first, sample, block_q
):
    q, k = randn(2, q_len, 4, 16), randn(2, kv_len, 2, 16, seed=1)
    options = {"keys": keys, "granule": granule, "local": local, "first": first, "sample": sample}
    mask = patterns.hip(q, k, **options, block_q=block_q)
    mask.validate()
    assert mask.to_dense().equal(definition(q, k, *options.values(), block_q, 64))

    def one_by_one(rows, *_):
        return [slice(row, row + 1) for row in range(rows)]

    monkeypatch.setattr(block_lists, "chunks", one_by_one)
    again = patterns.hip(q, k, **options, block_q=block_q)
    assert again.to_dense().equal(mask.to_dense())


def test_from_q_k_v_to_the_output(randn, agrees):
    q, k, v = (randn(1, 300, heads, 32, seed=s) for s, heads in enumerate((4, 2, 2)))
    mask = patterns.hip(q, k, keys=32, local=0)
    visible = definition(q, k, 32, 2, 0, 4, 2, 64, 64)
    agrees(*stripe_attention(q, k, v, mask, return_lse=True), q, k, v, visible)


def test_without_the_host(randn):
    q, k = randn(1, 2048, 2, 16), randn(1, 2048, 1, 16)
    with Watch() as watch:
        mask = patterns.hip(q, k, keys=64)
    mask.validate()
    assert watch.largest <= 1 << 20
    on_meta = patterns.hip(q.to("meta"), k.to("meta"), keys=64)
    assert on_meta.columns.shape == mask.columns.shape
    assert patterns.hip(q[:0], k[:0]).counts.shape == (0, 2, 32)
    assert patterns.hip(q[:, :0], k).counts.shape == (1, 2, 0)


Q = torch.zeros(1, 9, 2, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keys": 0}, ValueError, "keys must be at least 1, got 0"),
        ({"keys": 33}, ValueError, "keys must be a multiple of granule = 2, got 33"),
        ({"granule": 0}, ValueError, "granule must be at least 1, got 0"),
        ({"sample": 0}, ValueError, "sample must be at least 1, got 0"),
        ({"local": -1}, ValueError, "local must be at least 0, got -1"),
        ({"first": 1.5}, TypeError, r"first must be an int, got 1\.5"),
        ({"block_q": 32}, ValueError, "block_q must be a multiple of 64 from 64 to 2048, got 32"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        patterns.hip(Q, Q, **options)
