"""The ops that choose AnchorAttention's distant keys, against their definition, token by token."""

import pytest
import torch

from sparse_fmha._ops import anchor_words
from sparse_fmha.patterns.anchor import distant_keys

OPS = torch.ops.sparse_fmha
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Length, block, step, heads, heads of k, head dim.
CASES = [
    (700, 64, 2, 4, 2, 16),
    (640, 64, 1, 2, 2, 40),  # superblocks of one block
    (1001, 128, 3, 3, 1, 24),  # a last superblock of two blocks, the last one of an odd number
    (513, 128, 1, 2, 1, 8),  # a last block of one token
    (900, 64, 4, 5, 5, 72),
    (1300, 64, 16, 2, 1, 16),
    (2500, 64, 32, 1, 1, 8),
    (2400, 128, 16, 2, 1, 8),
    (384, 128, 2, 1, 1, 256),  # superblocks 0 and 1, and no candidate
    (90, 128, 16, 2, 2, 16),  # less than a block
    (1, 64, 1, 1, 1, 8),
]


def drawn(randn, case, dtype=torch.float32, batch=2):
    length, _, _, heads, heads_kv, dim = case
    q = randn(batch, length, heads, dim, dtype=dtype, seed=1)
    return q, randn(batch, length, heads_kv, dim, dtype=dtype, seed=2)


def scores(rows, k):
    """fp64 `[B, H, rows, keys]` of rows `[B, H, rows, D]`."""
    group = rows.shape[1] // k.shape[2]
    return rows.double() @ k.double().repeat_interleave(group, 2).permute(0, 2, 3, 1)


def expected_means(q, k, block, step, scale):
    length = q.shape[1]
    pairs = scale * scores(q.transpose(1, 2), k)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    superblock = i // (step * block) * step * block
    seen = (j <= i) & ((j < block) | (j >= superblock - block))
    tops = pairs.masked_fill(~seen, -torch.inf).amax(-1)
    return torch.stack([part.mean(-1) for part in tops.split(block, -1)], -1)


def expected_keys(q_mean, k, least, block, step, size):
    """Bool `[B, H, superblocks, L]`: what is kept, and what may go either way within `size`."""
    against = scores(q_mean, k) - least.double()[..., None]
    kept, either = [], []
    for u, blocks in enumerate(against.split(step, 2)):
        above, near = blocks >= size, (blocks.abs() < size).any(2)
        keys = torch.arange(k.shape[1])
        candidates = (keys >= block) & (keys < u * step * block - block)
        kept.append(above.any(2) & candidates)
        either.append(near & ~above.any(2) & candidates)
    return torch.stack(kept, 2), torch.stack(either, 2)


def unpacked(bits, block, length):
    """Bool `[B, H, superblocks, L]` of 32-bit words."""
    shifts = torch.arange(32, dtype=torch.int32)
    flat = (bits[..., None] >> shifts & 1).bool().flatten(-2)
    seen = torch.zeros(*flat.shape[:-1], length + flat.shape[-1] + block, dtype=torch.bool)
    seen[..., block : block + flat.shape[-1]] = flat
    assert not seen[..., length:].any()
    return seen[..., :length]


def thresholds(q_mean, k):
    """fp32 `[B, H, blocks]`: what about one score in fifty reaches, and one list none, one all."""
    least = scores(q_mean, k).float().quantile(0.98123, -1)  # between two of them
    least[0, 0, : least.shape[2] // 3] = torch.inf
    least[-1, -1, -1] = -torch.inf
    return least


def pooled(q, block, scale):
    """fp32 `[B, H, blocks, D]`."""
    means = [scale * part.double().mean(1) for part in q.split(block, 1)]
    return torch.stack(means, 2).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_means(randn, case, dtype):
    _, block, step, *_ = case
    q, k = drawn(randn, case, dtype)
    for scale in (0.3, -0.2):
        found = OPS.anchor_means(q, k, block, step, scale)
        assert found.dtype == torch.float32
        expected = expected_means(q, k, block, step, scale)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    assert OPS.anchor_means(q, k, block, step, 0.0).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys_and_columns(randn, case, dtype):
    length, block, step, *_ = case
    q, k = drawn(randn, case, dtype)
    q_mean = pooled(q, block, 8.0)
    least = thresholds(q_mean, k)
    bits, counts = OPS.anchor_keys(q_mean, k, least, block, step)
    found = unpacked(bits, block, length)
    kept, either = expected_keys(q_mean, k, least, block, step, 1e-5)
    assert found[~either].equal(kept[~either])
    assert counts.equal(found.sum(-1, dtype=torch.int32))
    assert either.sum() <= 5
    widest = int(counts.max())
    assert widest > 0 or bits.shape[-1] == 0
    for width in (widest, widest + 7, widest // 2, 0):
        columns, lengths = OPS.anchor_columns(bits, block, width)
        assert columns.shape == (*counts.shape, width)
        assert lengths.equal(counts.clamp(max=width))
        for row, all_of_it in zip(columns.flatten(0, 2), found.flatten(0, 2), strict=True):
            keys = all_of_it.nonzero()[:width, 0].int()
            assert row[: len(keys)].equal(keys)
            assert row[len(keys) :].eq(-1).all()


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(randn, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    block = (64, 128)[pick(0, 1)]
    step, heads_kv = pick(1, 16), pick(1, 3)
    length = pick(1, 1700)
    case = length, block, step, heads_kv * pick(1, 4), heads_kv, 8 * pick(1, 12)
    q, k = drawn(randn, case, DTYPES[pick(0, 3)], batch=1)
    means = OPS.anchor_means(q, k, block, step, 0.1)
    expected = expected_means(q, k, block, step, 0.1)
    torch.testing.assert_close(means.double(), expected, rtol=2e-6, atol=2e-6)
    theta = 1.5 + 0.1 * seed
    columns, counts = distant_keys(q, k, theta, step, block, 0.1, None)
    q_mean = pooled(q, block, 0.1)
    kept, either = expected_keys(q_mean, k, expected - theta, block, step, 1e-5)
    assert columns.shape[-1] == (int(counts.max()) if counts.numel() else 0)
    listed = torch.zeros(*counts.shape, length + 1, dtype=torch.bool)
    listed.scatter_(-1, torch.where(columns < 0, length, columns).long(), True)
    assert listed[..., :-1][~either].equal(kept[~either])


def test_strides_do_not_change_the_result(randn):
    case = 700, 64, 2, 4, 2, 16
    q, k = drawn(randn, case, torch.bfloat16)
    q_mean = pooled(q, 64, 0.25)
    least = thresholds(q_mean, k)
    expected = OPS.anchor_means(q, k, 64, 2, 0.25), *OPS.anchor_keys(q_mean, k, least, 64, 2)

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def part(x):
        return torch.cat((x, x, x), -1)[..., 16:32]

    for view in (heads_first, part):
        found = (
            OPS.anchor_means(view(q), view(k), 64, 2, 0.25),
            *OPS.anchor_keys(view(q_mean), view(k), least, 64, 2),
        )
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    one = k[:, :1].expand(k.shape)
    assert OPS.anchor_keys(q_mean, one, least, 64, 2)[0].equal(
        OPS.anchor_keys(q_mean, one.contiguous(), least, 64, 2)[0]
    )


def test_nothing_is_left_unwritten(randn, poisoned):
    case = 700, 64, 2, 4, 2, 16
    q, k = drawn(randn, case)
    q_mean = pooled(q, 64, 0.25)
    least = thresholds(q_mean, k)
    results = []
    for _ in range(2):
        with poisoned():
            bits, counts = OPS.anchor_keys(q_mean, k, least, 64, 2)
            results.append((bits, counts, *OPS.anchor_columns(bits, 64, 50)))
    assert bits[:, :, 0].eq(0).all()
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_nan_keeps_nothing(randn):
    """A block with a NaN score has no anchor; blocks that do not see it are as ever."""
    case = 700, 64, 2, 1, 1, 16
    q, k = drawn(randn, case)
    expected = OPS.anchor_means(q, k, 64, 2, 0.25)
    k_with_nan = k.clone()
    k_with_nan[:, 130] = torch.nan  # its own superblock alone sees it, and other keys after it
    found = OPS.anchor_means(q, k_with_nan, 64, 2, 0.25)
    assert found[..., 2:4].isnan().all()
    found[..., 2:4] = expected[..., 2:4]
    assert found.equal(expected)
    q[:, 300] = torch.nan
    found = OPS.anchor_means(q, k, 64, 2, 0.25)
    assert found[..., 4].isnan().all()
    found[..., 4] = expected[..., 4]
    assert found.equal(expected)
    q_mean = pooled(q, 64, 0.25)
    least = torch.full_like(expected, -100.0)
    least[..., :4] = torch.nan
    assert OPS.anchor_keys(q_mean, k, least, 64, 2)[1][..., :2].eq(0).all()


def test_width_and_candidates(randn):
    q, k = drawn(randn, (700, 64, 2, 2, 1, 16), batch=1)
    everything = sum(max(0, (2 * u - 2) * 64) for u in range(6))
    columns, counts = distant_keys(q, k, 1e6, 2, 64, 0.25, None)
    assert counts.sum() == 2 * everything
    assert columns.shape[-1] == counts.max() == 32 * anchor_words(11, 64, 2)
    for width, wide in ((5, 5), (10**6, columns.shape[-1]), (0, 0)):
        cut, lengths = distant_keys(q, k, 1e6, 2, 64, 0.25, width)
        assert cut.equal(columns[..., :wide])
        assert lengths.equal(counts.clamp(max=width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8]], ids=str)
def test_opcheck(randn, case, dtype):
    _, block, step, *_ = case
    q, k = drawn(randn, case, dtype)
    torch.library.opcheck(OPS.anchor_means, (q, k, block, step, 0.25))
    q_mean = pooled(q, block, 0.25)
    least = thresholds(q_mean, k)
    torch.library.opcheck(OPS.anchor_keys, (q_mean, k, least, block, step))
    bits, _ = OPS.anchor_keys(q_mean, k, least, block, step)
    torch.library.opcheck(OPS.anchor_columns, (bits, block, 9))


def test_no_backward(randn):
    q, k = drawn(randn, CASES[0])
    means = OPS.anchor_means(q.requires_grad_(), k, 64, 2, 0.25)
    with pytest.raises(NotImplementedError, match="anchor_means has no backward"):
        means.sum().backward()


@pytest.mark.parametrize("shape", [(0, 300, 2, 16), (1, 0, 2, 16), (1, 300, 0, 16)])
def test_empty(shape):
    q = torch.zeros(shape)
    blocks = -(-shape[1] // 64)
    means = OPS.anchor_means(q, q, 64, 1, 1.0)
    assert means.shape == (shape[0], shape[2], blocks)
    q_mean = torch.zeros(shape[0], shape[2], blocks, 16)
    bits, counts = OPS.anchor_keys(q_mean, q, means, 64, 1)
    assert bits.shape == (*counts.shape, anchor_words(blocks, 64, 1))
    assert OPS.anchor_columns(bits, 64, 3)[0].shape == (*counts.shape, 3)


def test_errors(randn):
    q, k = drawn(randn, CASES[0])
    q_mean, least = torch.zeros(2, 4, 11, 16), torch.zeros(2, 4, 11)
    bits = torch.zeros(2, 4, 6, 3, dtype=torch.int32)
    wrong = [
        ("block must be 64 or 128, got 32", lambda: OPS.anchor_means(q, k, 32, 2, 1.0)),
        (
            "step must be from 1 to 32 blocks of 64.*, got 0",
            lambda: OPS.anchor_means(q, k, 64, 0, 1.0),
        ),
        ("step must be from 1 to 16.*, got 17", lambda: OPS.anchor_keys(q_mean, k, least, 128, 17)),
        (
            "scale must be a finite number, got inf",
            lambda: OPS.anchor_means(q, k, 64, 2, torch.inf),
        ),
        (
            "k must have the 699 tokens of q, got 700",
            lambda: OPS.anchor_means(q[:, 1:], k, 64, 2, 1.0),
        ),
        ("k must have q's dtype", lambda: OPS.anchor_means(q.half(), k, 64, 2, 1.0)),
        (
            "heads of q must be .*, got 3 and 2",
            lambda: OPS.anchor_means(q[:, :, :3], k, 64, 2, 1.0),
        ),
        ("k must have 4 dimensions", lambda: OPS.anchor_keys(q_mean, k[0], least, 64, 2)),
        (
            "head dim of k must be .*, got 12",
            lambda: OPS.anchor_keys(q_mean, k[..., :12], least, 64, 2),
        ),
        ("k must have dtype .*, got Int", lambda: OPS.anchor_keys(q_mean, k.int(), least, 64, 2)),
        (
            "k must have stride 1 in its last dimension, got 2",
            lambda: OPS.anchor_keys(q_mean, k[..., ::2], least, 64, 2),
        ),
        ("q_mean must have shape", lambda: OPS.anchor_keys(q_mean[:, :, 1:], k, least, 64, 2)),
        (
            "heads of q_mean must be .*, got 3 and 2",
            lambda: OPS.anchor_keys(q_mean[:, :3], k, least, 64, 2),
        ),
        (
            "q_mean must have .*dtype.*, got Double",
            lambda: OPS.anchor_keys(q_mean.double(), k, least, 64, 2),
        ),
        ("least must have shape", lambda: OPS.anchor_keys(q_mean, k, least[..., 1:], 64, 2)),
        ("least must have dtype", lambda: OPS.anchor_keys(q_mean, k, least.double(), 64, 2)),
        ("bits must have dtype", lambda: OPS.anchor_columns(bits.long(), 64, 2)),
        ("bits must have shape", lambda: OPS.anchor_columns(bits[0], 64, 2)),
        ("width must be from 0 .*, got -1", lambda: OPS.anchor_columns(bits, 64, -1)),
        (
            "first and the words of bits must be .*, got -64",
            lambda: OPS.anchor_columns(bits, -64, 1),
        ),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()
