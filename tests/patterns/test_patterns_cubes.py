"""Cube orders, and the methods that choose cubes, each against its definition."""

import itertools
import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import block_sparse_attention, patterns, reference


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = [
    # grid, cube, tokens before and after
    ((2, 16, 24), (1, 8, 8), 0, 0),
    ((5, 10, 9), (4, 4, 4), 70, 0),  # smaller cubes at the ends
    ((1, 17, 32), (1, 8, 16), 0, 130),
    ((300,), (64,), 3, 75),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def places(grid, cube, before, after):
    """The block of each token by loops, numbered in order, and the place of each cube."""
    block, names = math.prod(cube), []
    names += [("before", n // block) for n in range(before)]
    for place in itertools.product(*map(range, grid)):
        names.append(("cube", tuple(p // c for p, c in zip(place, cube, strict=True))))
    names += [("behind", n // block) for n in range(after)]
    order = {"before": 0, "cube": 1, "behind": 2}
    distinct = sorted(set(names), key=lambda name: (order[name[0]], name[1]))
    return torch.tensor([distinct.index(name) for name in names]), distinct


def inputs(case, heads=(4, 2), seed=0):
    grid, cube, before, after = case
    tokens = before + math.prod(grid) + after
    block, _ = places(*case)
    q, k, v = (normal(2, tokens, h, 16, seed=seed + n) for n, h in enumerate((*heads, heads[1])))
    near = [2 * normal(2, int(block.max()) + 1, h, 16, seed=seed + 9)[:, block] for h in heads]
    order = patterns.CubeOrder(grid, cube, before=before, after=after)
    return q + near[0], k + near[1], v, order


def means(x, block):
    return torch.stack([x[:, block == n].double().mean(1) for n in range(int(block.max()) + 1)], 1)


def products(q, k, block, scale=None):
    """Scores of block means, fp64 [B, Hq, n, n]."""
    a, b = means(q, block), means(k, block).repeat_interleave(q.shape[2] // k.shape[2], 2)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return scale * torch.einsum("bihd,bjhd->bhij", a, b)


def seen_tokens(mask, order):
    """A mask in cube order as one of tokens in their own order."""
    return mask.to_dense()[:, :, order.slots][..., order.slots]


@cases
def test_order(case):
    grid, cube, before, after = case
    block, names = places(*case)
    order = patterns.CubeOrder(grid, cube, before=before, after=after)
    assert torch.equal(order.slots // order.block, block)
    assert order.regions == len(names)
    assert order.others().tolist() == [name[0] != "cube" for name in names]
    assert order.ragged == sum(block.bincount() < order.block)
    x = normal(2, len(block), 2, 3)
    assert torch.equal(order.undo(order.permute(x)), x)
    window = (3, 5, 3)[: len(grid)]
    near = order.near(window)
    for (i, a), (j, b) in itertools.product(enumerate(names), repeat=2):
        cubes = a[0] == b[0] == "cube"
        expected = cubes and all(
            abs(x - y) <= w // 2 for x, y, w in zip(a[1], b[1], window, strict=True)
        )
        assert near[i, j] == expected


@cases
def test_a_map_of_blocks(case):
    block, _ = places(*case)
    q, k, v, order = inputs(case)
    blocks = normal(2, 4, order.regions, order.regions, seed=3) > 0.3
    mask = order.mask(blocks)
    mask.validate()
    visible = blocks[:, :, block][..., block]
    assert torch.equal(seen_tokens(mask, order), visible)
    permuted = order.permute(q), order.permute(k), order.permute(v)
    out = order.undo(block_sparse_attention(*permuted, mask))
    expected, _ = reference.attention(q, k, v, visible)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@cases
@pytest.mark.parametrize(("p", "near"), [(0.5, True), (0.9, False)])
def test_nabla(case, p, near):
    block, _ = places(*case)
    q, k, _, order = inputs(case)
    window = (3, 3, 3)[: len(order.grid)] if near else None
    with Watch():
        mask = patterns.nabla(q, k, order, p=p, window=window)
    mask.validate()
    shares = products(q, k, block).softmax(-1)
    others = order.others()
    expected = torch.zeros_like(shares, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, shares.shape[:3])).tolist():
        mass = 0.0
        for j in shares[b, h, i].argsort(descending=True).tolist():
            expected[b, h, i, j] = mass < p
            mass += shares[b, h, i, j]
    expected |= others | others[:, None]
    if near:
        expected |= order.near(window)
    assert torch.equal(seen_tokens(mask, order), expected[:, :, block][..., block])
    assert not expected.all()


@cases
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_draft(case, keep):
    block, names = places(*case)
    q, k, _, order = inputs(case)
    with Watch():
        mask = patterns.draft(q, k, order, keep=keep)
    mask.validate()
    cubes = torch.tensor([name[0] == "cube" for name in names])
    inside = cubes & cubes[:, None]
    scores = products(q, k, block)
    scores[..., ~cubes] = -torch.inf
    shares = scores.softmax(-1)
    expected = (~inside).expand(2, 4, -1, -1).clone()
    count = math.ceil(keep * int(cubes.sum()) ** 2 - 1e-9)
    for b, h in itertools.product(range(2), range(4)):
        own = shares[b, h][inside]
        expected[b, h][inside] = own >= own.sort(descending=True).values[count - 1]
    assert torch.equal(seen_tokens(mask, order), expected[:, :, block][..., block])


@cases
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_cube_top_k(case, keep):
    block, names = places(*case)
    q, k, _, order = inputs(case)
    with Watch():
        mask = patterns.cube_top_k(q, k, order, keep=keep)
    mask.validate()
    cubes = torch.tensor([name[0] == "cube" for name in names])
    scores = products(q, k, block).masked_fill(~cubes, -torch.inf)
    count = max(1, math.floor(keep * int(cubes.sum()) + 1e-9))
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected.scatter_(-1, scores.topk(count, -1).indices, True)
    expected |= ~cubes | ~cubes[:, None]
    assert torch.equal(seen_tokens(mask, order), expected[:, :, block][..., block])


@cases
@pytest.mark.parametrize(
    ("options", "gated"), [({"keep": 0.3}, True), ({"top_k": 2, "scale": 0.4}, False)]
)
def test_vsa(case, options, gated):
    block, names = places(*case)
    q, k, v, order = inputs(case)
    gate = normal(*q.shape, seed=7) if gated else None
    with Watch():
        out = patterns.vsa_attention(q, k, v, order, **options, gate=gate)
    expected = vsa(q, k, v, block, names, gate, **options)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def vsa(q, k, v, block, names, gate, keep=0.1, top_k=None, scale=None):
    cubes = torch.tensor([name[0] == "cube" for name in names])
    top_k = math.ceil(keep * int(cubes.sum())) if top_k is None else top_k
    scores = products(q, k, block, scale)
    scores = scores.masked_fill(~cubes, -torch.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(top_k, -1).indices, True)
    chosen |= ~cubes | ~cubes[:, None]
    fine, _ = reference.attention(q, k, v, chosen[:, :, block][..., block], scale)
    values = means(v, block).repeat_interleave(q.shape[2] // k.shape[2], 2)
    coarse = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)[:, block]
    coarse = coarse if gate is None else coarse * gate
    return fine + coarse * cubes[block][:, None, None]


def test_vsa_trains():
    case = CASES[1]
    block, names = places(*case)
    q, k, v, order = inputs(case)
    leaves = [x[:1].double().requires_grad_() for x in (q, k, v)]
    leaves.append(normal(*leaves[0].shape, seed=7).double().requires_grad_())
    weight = normal(*leaves[0].shape, seed=8)
    out = patterns.vsa_attention(*leaves[:3], order, top_k=2, gate=leaves[3])
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    expected = vsa(*leaves[:3], block, names, leaves[3], top_k=2)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)  # means are in fp32


ORDER = patterns.CubeOrder((8, 8), (8, 8))
Q = normal(1, 64, 2, 16)
C, V = patterns.CubeOrder, patterns.vsa_attention


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: C((4, 4), (4, 4)),
            ValueError,
            r"cube must have 64 or 128 tokens, as blocks of queries have, got \[4, 4\],",
        ),
        (
            lambda: C((4, 4), (64,)),
            ValueError,
            r"grid must have one to three entries, and cube as many, got \[4, 4\] and",
        ),
        (lambda: C((0, 4), (8, 8)), ValueError, r"grid\[0\] must be at least 1, got 0"),
        (lambda: C((8, 8), (8, 8), after=-1), ValueError, "after must be at least 0, got -1"),
        (
            lambda: ORDER.near((3,)),
            ValueError,
            r"window must have 2 entries, one for each axis, got \[3\]",
        ),
        (
            lambda: patterns.nabla(Q, Q, ORDER),
            ValueError,
            r"window must have 2 entries, one for each axis, got \[11, 3, 3\]",
        ),
        (
            lambda: patterns.nabla(Q, Q, ORDER, window=(2, 3)),
            ValueError,
            r"window\[0\] must be odd, got 2",
        ),
        (lambda: patterns.nabla(Q, Q, ORDER, p=2), ValueError, "p must be from 0 to 1, got 2"),
        (
            lambda: patterns.nabla(Q[:, 1:], Q, ORDER),
            ValueError,
            r"x must have 64 tokens, got shape \[1, 63, 2, 16\]",
        ),
        (
            lambda: patterns.draft(Q, Q, ORDER, keep=-1),
            ValueError,
            "keep must be from 0 to 1, got -1",
        ),
        (
            lambda: patterns.cube_top_k(Q, Q, ORDER, keep=2),
            ValueError,
            "keep must be from 0 to 1, got 2",
        ),
        (lambda: V(Q, Q, Q, ORDER, keep="a"), TypeError, "keep must be a number, got 'a'"),
        (lambda: V(Q, Q, Q, ORDER, top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (
            lambda: V(Q[:, 1:], Q[:, 1:], Q[:, 1:], ORDER),
            ValueError,
            r"x must have 64 tokens, got shape \[1, 63, 2, 16\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
