"""Pyramid sparse attention against its definition in fp64, with loops over blocks."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import BlockGrid, block_sparse_attention, patterns
from sparse_fmha.masks import block_lists


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(q_len, kv_len, heads=(4, 2), dim=16, seed=0):
    k, v = (normal(2, kv_len, heads[1], dim, seed=seed + n) for n in range(2))
    return normal(2, q_len, heads[0], dim, seed=seed + 2), k, v


def pyramid(q, k, v, levels, block_q, block_kv, causal, scale=None):
    """One softmax over all pooled keys that a row's blocks stand for."""
    heads, dim = q.shape[2:]
    scale = dim**-0.5 if scale is None else scale
    q_len, kv_len = q.shape[1], k.shape[1]
    k, v = (x.double().repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    keys, values, biases, lasts, blocks, which = [], [], [], [], [], []
    for level in (1, 2, 4, 8):
        for block, start in enumerate(range(0, kv_len, block_kv)):
            end = min(start + block_kv, kv_len)
            short = end - start < block_kv
            if short and level > 1:
                continue
            for first in range(start, end, level):
                keys.append(k[:, first : first + level].mean(1))
                values.append(v[:, first : first + level].mean(1))
                biases.append(math.log(level))
                lasts.append(first + level - 1)
                blocks.append(block)
                which.append(0 if short else level)  # 0: any level but 0
    keys, values = torch.stack(keys, 1), torch.stack(values, 1)
    blocks, which, lasts = torch.tensor(blocks), torch.tensor(which), torch.tensor(lasts)
    rows = torch.arange(q_len) // block_q
    own = levels.long()[:, :, rows][..., blocks]  # [B, H, Lq, pooled keys]
    visible = torch.where(which == 0, own > 0, own == which)
    if causal:
        visible = visible & (lasts <= torch.arange(q_len)[:, None] + kv_len - q_len)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.double(), keys) + torch.tensor(biases)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights.nan_to_num(0), values)


def drawn(q, k, block_q, block_kv, seed, heads=None):
    n = [-(-x.shape[1] // b) for x, b in ((q, block_q), (k, block_kv))]
    choice = torch.tensor([0, 1, 2, 4, 8], dtype=torch.uint8)
    shape = (q.shape[0], heads or q.shape[2], *n)
    return choice[torch.randint(5, shape, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_q", "block_kv", "scale"),
    [
        (256, 512, 128, 128, None),
        (300, 333, 64, 64, 0.5),  # granules of 8 keys
        (200, 230, 128, 32, None),  # of 4
        (150, 97, 64, 16, None),  # of 2; with causal, rows that see nothing
        (70, 60, 64, 128, None),  # one short block
    ],
)
def test_attention(q_len, kv_len, block_q, block_kv, scale, causal):
    q, k, v = inputs(q_len, kv_len, seed=q_len)
    levels = drawn(q, k, block_q, block_kv, seed=kv_len)
    options = {"block_q": block_q, "block_kv": block_kv, "causal": causal, "scale": scale}
    with Watch():
        out = patterns.psa_attention(q, k, v, levels, **options)
    expected = pyramid(q, k, v, levels, block_q, block_kv, causal, scale)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_levels_of_all_heads_and_fewer_pools():
    q, k, v = inputs(128, 256)
    levels = drawn(q, k, 64, 64, seed=3, heads=1)[:1]
    options = {"block_q": 64, "block_kv": 64}
    out = patterns.psa_attention(q, k, v, levels, pools=(1, 4), **options)
    kept = torch.where((levels == 1) | (levels == 4), levels, 0).expand(2, 4, -1, -1)
    expected = pyramid(q, k, v, kept, 64, 64, False)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_level_1_is_block_sparse_attention():
    q, k, v = inputs(256, 256)
    levels = (drawn(q, k, 64, 64, seed=1) > 1).to(torch.uint8)
    grid = BlockGrid.of(q, k, 64, 64)
    out = patterns.psa_attention(q, k, v, levels, block_q=64, block_kv=64, pools=(1,))
    assert torch.equal(out, block_sparse_attention(q, k, v, grid.mask(levels > 0)))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    tensors = [x[:1].double().requires_grad_() for x in inputs(128, 144, heads=(2, 1))]
    levels = drawn(*tensors[:2], 64, 32, seed=5)
    weight = normal(1, 128, 2, 16, seed=4)
    out = patterns.psa_attention(*tensors, levels, block_q=64, block_kv=32, causal=causal)
    ours = torch.autograd.grad((out * weight).sum(), tensors)
    expected = pyramid(*tensors, levels, 64, 32, causal)
    theirs = torch.autograd.grad((expected * weight).sum(), tensors)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


def importance(q, k, block_q, block_kv, every, causal):
    """The largest probability of each pair of blocks, of every `every`-th token."""
    shift = k.shape[1] - q.shape[1]
    heads = q.shape[2]
    k = k.double().repeat_interleave(heads // k.shape[2], 2)[:, ::every]
    scores = torch.einsum("bihd,bjhd->bhij", q.double()[:, ::every], k) * q.shape[3] ** -0.5
    i, j = (torch.arange(n) * every for n in scores.shape[2:])
    if causal:
        scores = scores.masked_fill(j > i[:, None] + shift, -torch.inf)
    shares = scores.softmax(-1).nan_to_num(0)
    rows = [shares[:, :, i // block_q == n].amax(2) for n in range(int(i[-1]) // block_q + 1)]
    columns = [j // block_kv == n for n in range(int(j[-1]) // block_kv + 1)]
    return torch.stack([torch.stack([r[..., c].amax(-1) for c in columns], -1) for r in rows], 2)


def cap(k, similarity, block):
    """The highest level of each block and head by cosines, with loops."""
    result = torch.ones(k.shape[0], k.shape[2], -(-k.shape[1] // block), dtype=torch.long)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, result.shape)).tolist():
        keys = k[b, n * block : (n + 1) * block, h].double()
        for level, threshold in similarity.items():
            if len(keys) == block:
                cosines = [
                    torch.nn.functional.cosine_similarity(keys[a], keys[a + level - 1], dim=0)
                    for a in range(0, block, level)
                ]
                if sum(cosines) / len(cosines) > threshold:
                    result[b, h, n] = max(result[b, h, n], level)
    return result


@pytest.mark.parametrize(
    ("by", "shares", "causal", "similarity", "text"),
    [
        ("rank", {1: 0.1, 2: 0.3, 8: 0.7}, False, None, 0),
        ("rank", {1: 0.1, 4: 0.5}, True, None, 0),
        ("mass", {1: 0.2, 2: 0.4, 4: 0.6, 8: 0.9}, False, None, 70),
        ("mass", {1: 0.1, 8: 1.0}, True, {2: 0.3, 4: 0.25, 8: 0.2}, 0),
    ],
)
def test_levels(by, shares, causal, similarity, text):
    q, k, _ = inputs(390, 420, seed=6)
    k = k + 2 * normal(2, 27, 2, 16, seed=8).repeat_interleave(16, 1)[:, :420]
    q = q * 2
    options = {"block_q": 64, "block_kv": 32, "causal": causal}
    with Watch():
        levels = patterns.psa_levels(
            q, k, shares, by=by, similarity=similarity, text=text, least=0.2, **options
        )
    assert levels.dtype == torch.uint8
    assert set(levels.unique().tolist()) >= {0, 1, *shares} - {0 if 1.0 in shares.values() else -1}
    found = importance(q, k, 64, 32, 4, causal)
    _, columns = found.shape[2:]
    caps = None if similarity is None else cap(k, similarity, 32).repeat_interleave(2, 1)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, found.shape[:3])).tolist():
        first, last = i * 64 + 30, min(i * 64 + 63, 389) + 30  # positions of the row's queries
        seen = [j for j in range(columns) if not causal or j * 32 <= last]
        order = sorted(seen, key=lambda j: -found[b, h, i, j])
        total, mass, expected = found[b, h, i, seen].sum(), 0.0, {}
        for rank, j in enumerate(order):
            for level, share in reversed(shares.items()):
                count = math.ceil(share * len(seen) - 1e-9)
                few = int(0.2 * columns) + 1 if level == 1 else 1
                taken = rank < count if by == "rank" else mass < share * total or rank < few
                if taken and found[b, h, i, j] > 0:
                    expected[j] = level
            mass += found[b, h, i, j]
        for j in range(columns):
            level = expected.get(j, 0)
            if caps is not None:
                level = min(level, int(caps[b, h, j]))
            if j == columns - 1:
                level = min(level, 1)
            own = causal and j * 32 <= last and (j + 1) * 32 > first
            if own or (text and (j + 1) * 32 > 420 - text):
                level = 1
            assert levels[b, h, i, j] == level, (b, h, i, j)


@pytest.mark.parametrize("by", ["rank", "mass"])
def test_equal_importance_and_one_row_at_a_time(monkeypatch, by):
    q, k, _ = inputs(256, 256, seed=3)
    k = k[:, torch.arange(256) % 64]  # every fourth block of 16 is the same: the first is taken
    options = {"block_q": 64, "block_kv": 16, "by": by}
    levels = patterns.psa_levels(q, k, {1: 0.25, 2: 0.5, 4: 0.75}, **options)
    found = importance(q, k, 64, 16, 4, False).unflatten(3, (4, 4))[..., 0, :]
    order = found.argsort(-1, descending=True)  # of the four blocks that differ
    if by == "rank":
        of_level = torch.tensor([1, 2, 4, 0]).expand(order.shape)
        expected = torch.empty_like(order).scatter_(-1, order, of_level)
        assert levels.unflatten(3, (4, 4)).equal(expected[..., None, :].expand(-1, -1, -1, 4, -1))
    else:
        copies = levels.unflatten(3, (4, 4)).long()
        copies = torch.where(copies == 0, 9, copies)
        assert (copies[..., 1:, :] >= copies[..., :-1, :]).all()

    def one_by_one(rows, *_, **__):
        return [slice(row, row + 1) for row in range(rows)]

    for causal in (False, True):
        whole = patterns.psa_levels(q, k, causal=causal, **options)
        with monkeypatch.context() as patch:
            patch.setattr(block_lists, "chunks", one_by_one)
            assert patterns.psa_levels(q, k, causal=causal, **options).equal(whole)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_of_any_sign(scale, causal):
    q, k, _ = inputs(200, 180, seed=5)
    options = {"block_q": 64, "block_kv": 16, "causal": causal}
    levels = patterns.psa_levels(q, k, scale=scale, **options)
    same = patterns.psa_levels(q * scale, k, scale=1.0, **options)
    assert (levels != same).float().mean() < 0.01
    assert levels.any(-1)[:, :, 1:].all()


Q = normal(1, 128, 2, 16)
LEVELS = torch.ones(1, 1, 1, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: patterns.psa_levels(Q, Q, {3: 0.5}),
            ValueError,
            "levels of shares must be 1, 2, 4 or 8, got 3",
        ),
        (
            lambda: patterns.psa_levels(Q, Q, {}),
            ValueError,
            "shares must have at least one level, got none",
        ),
        (
            lambda: patterns.psa_levels(Q, Q, {1: 0.5, 2: 0.4}),
            ValueError,
            r"shares\[2\] must be at least 0\.5, that of a lower level, got 0\.4",
        ),
        (lambda: patterns.psa_levels(Q, Q, by="x"), ValueError, "by must be rank or mass, got 'x'"),
        (
            lambda: patterns.psa_levels(Q, Q, every=3),
            ValueError,
            "every must divide block_q = 128, got 3",
        ),
        (
            lambda: patterns.psa_levels(Q, Q, similarity={1: 0.5}),
            ValueError,
            "levels of similarity must be 2, 4 or 8, got 1",
        ),
        (lambda: patterns.psa_levels(Q, Q, text=-1), ValueError, "text must be at least 0, got -1"),
        (
            lambda: patterns.psa_levels(Q, Q, scale=math.inf),
            ValueError,
            "scale must be a finite number, got inf",
        ),
        (
            lambda: patterns.psa_levels(Q, Q.double()),
            TypeError,
            r"k must have q's dtype, torch\.float32, got torch\.float64",
        ),
        (
            lambda: patterns.psa_attention(Q, Q, Q, LEVELS.float()),
            TypeError,
            r"levels must be a tensor of integers, got torch\.float32",
        ),
        (
            lambda: patterns.psa_attention(Q, Q, Q, LEVELS.expand(1, 1, 2, 1)),
            ValueError,
            r"blocks must have shape \[batch or 1, heads or 1, 1, 1\] for lengths 128",
        ),
        (
            lambda: patterns.psa_attention(Q, Q, Q, LEVELS, pools=()),
            ValueError,
            "pools must have at least one level, got none",
        ),
        (
            lambda: patterns.psa_attention(Q, Q, Q, LEVELS, pools=(16,)),
            ValueError,
            "levels of pools must be 1, 2, 4 or 8, got 16",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
