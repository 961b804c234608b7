"""Patterns that do not look at the input, each against its definition token by token."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_fmha import patterns

FEW = settings(max_examples=25)
NAN = float("nan")
TILES = st.sampled_from([(64, 64), (128, 128), (64, 16), (128, 32), (64, 128)])


def positions(q_len, kv_len):
    """Of queries [q_len, 1] and keys [kv_len], as integers."""
    return np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)


def agrees(mask, *heads):
    """The mask shows exactly the pairs of each head, bool [q_len, kv_len], or of all."""
    mask.validate()
    assert torch.equal(mask.to_dense()[0], torch.from_numpy(np.stack(heads)))


def lengths(block_q):
    """q_len <= kv_len or not, apart by whole blocks."""
    q_len = st.integers(1, 600)
    return st.tuples(q_len, st.integers(-2, 4)).map(
        lambda pair: (pair[0], max(pair[0] + pair[1] * block_q, pair[0] % block_q or block_q))
    )


@FEW
@given(st.data(), TILES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))
def test_s2_attention(data, tiles, heads, local, stride):
    q_len, kv_len = data.draw(lengths(tiles[0]))
    offset, more = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
    total = offset + heads + more
    i, j = positions(q_len, kv_len)
    block_i, block_j = i // 128, j // 128
    step = max(1, stride // total)

    def visible(head):
        vertical = (block_j + head * step + 1) % stride == 0
        return (j <= i) & ((block_i - block_j < local) | vertical)

    sizes = {"local_blocks": local, "stride": stride, "block": 128}
    sizes |= {"block_q": tiles[0], "block_kv": tiles[1]}
    mask = patterns.s2_attention(
        q_len, kv_len, heads, **sizes, head_offset=offset, total_heads=total
    )
    agrees(mask, *[visible(offset + head) for head in range(heads)])
    agrees(patterns.s2_attention(q_len, kv_len, heads, **sizes, homo_head=True), visible(0))


def test_s2_attention_heads_are_those_of_the_whole_model():
    """Two ranks have together what one has; the published defaults."""
    whole = patterns.s2_attention(3000, 3000, 8).to_dense()
    parts = [patterns.s2_attention(3000, 3000, 4, head_offset=n, total_heads=8) for n in (0, 4)]
    assert torch.equal(torch.cat([part.to_dense() for part in parts], 1), whole)
    assert not torch.equal(whole[:, :4], whole[:, 4:])
    i, j = positions(3000, 3000)
    near = i // 64 - j // 64 < 16
    for head in range(8):
        seen = (j <= i) & (near | ((j // 64 + head + 1) % 8 == 0))
        assert np.array_equal(whole[0, head].numpy(), seen)


@FEW
@given(st.data(), TILES, st.integers(0, 2), st.integers(1, 3), st.sampled_from([128, 256]))
def test_power_attention(data, tiles, sink, local, block):
    q_len, kv_len = data.draw(lengths(tiles[0]))
    mask = patterns.power_attention(
        q_len,
        kv_len,
        sink_blocks=sink,
        local_blocks=local,
        block=block,
        block_q=tiles[0],
        block_kv=tiles[1],
    )
    i, j = positions(q_len, kv_len)
    distance = i // block - j // block
    power = np.isin(distance, [2**n for n in range(20)])
    agrees(mask, (j <= i) & ((j // block < sink) | (distance < local) | power))


def test_power_attention_by_default():
    """At 32k about ten of 128 blocks to a row."""
    mask = patterns.power_attention(32768, 32768)
    rows = mask.blocks()[0, 0, ::2, ::2]  # blocks of 256
    expected = {0, 127, 126, 125, 124, 123, 119, 111, 95, 63}
    assert set(rows[127].nonzero()[:, 0].tolist()) == expected


@FEW
@given(
    st.data(),
    st.sampled_from([(64, 64), (64, 16)]),
    st.lists(
        st.tuples(st.integers(-500, 700), st.sampled_from([0, 0.1, 0.5, 1])),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([0, 64, 128]),
)
def test_moa(data, tiles, rules, sink):
    q_len, kv_len = data.draw(lengths(64))
    alphas, betas = zip(*rules, strict=True)
    mask = patterns.moa(
        q_len, kv_len, alphas, betas, sink=sink, min_span=192, block_q=tiles[0], block_kv=tiles[1]
    )
    i, j = positions(q_len, kv_len)
    heads = []
    for alpha, beta in rules:
        span = max(min(alpha + beta * kv_len, kv_len), 192)
        band = -(-span // 64) - sink // 64
        heads.append((j <= i) & ((j < sink) | (i // 64 - j // 64 < band)))
    agrees(mask, *heads)


@FEW
@given(st.integers(1, 500), st.integers(1, 500), TILES, st.integers(1, 300), st.integers(0, 150))
@example(256, 256, (64, 64), 127, 0)  # the edge is on a block's corner
def test_streaming_llm(q_len, kv_len, tiles, window, sink):
    sizes = {"block_q": tiles[0], "block_kv": tiles[1]}
    mask = patterns.streaming_llm(q_len, kv_len, window=window, sink=sink, **sizes)
    i, j = positions(q_len, kv_len)
    agrees(mask, (j <= i) & ((i - j < window) | (j < sink)))
    if mask.partial_counts is not None:
        assert mask.partial_counts.max() <= -(-tiles[0] // tiles[1]) + 2


def test_streaming_llm_by_default():
    mask = patterns.streaming_llm(2500, 2500)
    row = mask.to_dense()[0, 0, 2400].nonzero()[:, 0].tolist()
    assert row == [*range(4), *range(2400 - 1019, 2401)]
    assert mask.counts[0, 0].tolist()[7:19] == [7] * 12  # 1020 of 128 * 8 keys, without the edges


@FEW
@given(
    st.integers(1, 500),
    TILES,
    st.integers(1, 120),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.lists(st.integers(-500, 499), max_size=3),
    st.booleans(),
)
def test_longformer(length, tiles, half, dilations, tokens, causal):
    tokens = [token % length - (length if token < 0 else 0) for token in tokens]
    mask = patterns.longformer(
        length,
        window=2 * half,
        dilation=dilations,
        global_tokens=tokens,
        causal=causal,
        block_q=tiles[0],
        block_kv=tiles[1],
    )
    i, j = positions(length, length)
    every = np.isin(np.arange(length), [token % length for token in tokens])
    heads = []
    for dilation in dilations:
        gaps = [n * dilation for n in range(-half, half + 1)]
        seen = np.isin(i - j, gaps) | every[i] | every[j]
        heads.append(seen & (j <= i) if causal else seen)
    agrees(mask, *heads)


def test_longformer_by_default():
    """Most blocks of the window are full; only the edges and the global token are partial."""
    mask = patterns.longformer(2048)
    i, j = positions(2048, 2048)
    agrees(mask, (abs(i - j) <= 256) | (i == 0) | (j == 0))
    assert mask.counts[0, 0].tolist()[4:12] == [3] * 8
    whole = patterns.longformer(300, window=2, global_tokens=range(300))
    assert whole.partial_counts is None
    assert whole.to_dense().all()


@FEW
@given(
    st.integers(1, 900),
    st.integers(1, 3),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 4),
    st.sampled_from([(64, 64, 64), (128, 64, 16), (128, 128, 128)]),
    st.integers(0, 9),
)
def test_bigbird(length, heads, window, random, sizes, seed):
    block, block_q, block_kv = sizes
    options = {"window_blocks": window, "random_blocks": random, "seed": seed}
    options |= {"block": block, "block_q": block_q, "block_kv": block_kv}
    mask = patterns.bigbird(length, heads, **options)
    blocks = -(-length // block)
    dense = mask.to_dense()[0].numpy()
    seen = dense[:, ::block, ::block]
    number = np.arange(length) // block
    agrees(mask, *seen[:, number][:, :, number])
    assert len(dense) == (heads if random else 1)
    for head in seen:
        for row in range(blocks):
            if row in (0, blocks - 1):
                assert head[row].all()
                continue
            forced = {0, blocks - 1, *range(row - window // 2, row + window // 2 + 1)}
            forced &= set(range(blocks))
            listed = set(np.flatnonzero(head[row]))
            assert forced <= listed
            assert len(listed) == min(len(forced) + random, blocks)
    again = patterns.bigbird(length, heads, **options)
    assert torch.equal(again.indices, mask.indices)


def test_bigbird_heads_and_seeds_differ():
    masks = [patterns.bigbird(4096, 2, seed=seed).blocks() for seed in (0, 1)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0][:, 0], masks[0][:, 1])
    assert masks[0][0, :, 10].sum(-1).tolist() == [8, 8]


P = patterns


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: P.s2_attention(64, 64, 0), ValueError, "heads must be at least 1, got 0"),
        (
            lambda: P.s2_attention(64, 64, 2, stride=0),
            ValueError,
            "stride must be at least 1, got 0",
        ),
        (
            lambda: P.s2_attention(64, 64, 2, local_blocks=0),
            ValueError,
            "local_blocks must be at least 1, got 0",
        ),
        (
            lambda: P.s2_attention(64, 64, 2, homo_head=1),
            TypeError,
            "homo_head must be True or False, got 1",
        ),
        (
            lambda: P.s2_attention(64, 64, 2, head_offset=2, total_heads=3),
            ValueError,
            "total_heads must be at least 4, got 3",
        ),
        (
            lambda: P.s2_attention(64, 64, 2, block_q=128),
            ValueError,
            "block_q must divide the pattern's block of 64, got 128",
        ),
        (
            lambda: P.s2_attention(64, 100, 2),
            ValueError,
            "kv_len - q_len must be a multiple of block_q = 64, so that each query",
        ),
        (lambda: P.power_attention(64.0, 64), TypeError, "q_len must be an int, got 64.0"),
        (
            lambda: P.power_attention(64, 64, sink_blocks=-1),
            ValueError,
            "sink_blocks must be at least 0, got -1",
        ),
        (
            lambda: P.power_attention(64, 64, block=192),
            ValueError,
            "block_q must divide the pattern's block of 192, got 128",
        ),
        (
            lambda: P.moa(64, 64, [1], [1, 2]),
            ValueError,
            "alphas and betas must have one entry for each query head, got 1 and 2",
        ),
        (
            lambda: P.moa(64, 64, [], []),
            ValueError,
            "alphas and betas must have one entry for each query head, got 0 and 0",
        ),
        (lambda: P.moa(64, 64, [NAN], [0]), ValueError, "alphas must be finite numbers, got nan"),
        (lambda: P.moa(64, 64, [1], ["a"]), TypeError, "betas must be numbers, got 'a'"),
        (
            lambda: P.moa(64, 64, [1], [1], sink=4),
            ValueError,
            "sink must be a multiple of block = 64, got 4",
        ),
        (
            lambda: P.moa(64, 64, [1], [1], min_span=64),
            ValueError,
            "min_span must be at least 65, got 64",
        ),
        (lambda: P.streaming_llm(64, 64, window=0), ValueError, "window must be at least 1, got 0"),
        (lambda: P.streaming_llm(64, 64, sink=-1), ValueError, "sink must be at least 0, got -1"),
        (lambda: P.streaming_llm(64, 64, block_kv=8), ValueError, "block_kv must be .*, got 8"),
        (
            lambda: P.longformer(64, window=3),
            ValueError,
            "window must be even, half for each side, got 3",
        ),
        (lambda: P.longformer(64, dilation=0), ValueError, "dilation must be at least 1, got 0"),
        (
            lambda: P.longformer(64, dilation=[]),
            ValueError,
            "dilation must have one entry for each query head, got none",
        ),
        (
            lambda: P.longformer(64, global_tokens=[64]),
            ValueError,
            "global_tokens must be less than the 64 tokens, got 64",
        ),
        (lambda: P.bigbird(64, 1, window_blocks=2), ValueError, "window_blocks must be odd, got 2"),
        (
            lambda: P.bigbird(64, 1, global_blocks=[3]),
            ValueError,
            "global_blocks must be less than the 1 blocks, got 3",
        ),
        (lambda: P.bigbird(64, 0), ValueError, "heads must be at least 1, got 0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
