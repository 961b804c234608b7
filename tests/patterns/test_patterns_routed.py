"""Patterns that choose blocks by q and k, each against its definition."""

import pytest
import torch
from dispatch_watch import Watch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_fmha import block_sparse_attention, patterns, reference

FEW = settings(max_examples=25)
CLOSE = 1e-5  # scores nearer than this may be taken for equal
INF = float("inf")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def means(x, block):
    """fp64 [B, n, H, D]."""
    return torch.stack([part.double().mean(1) for part in x.split(block, 1)], 1)


def products(q, k, blocks, causal, scale=1.0):
    """Scores of blocks by loops, fp64 [B, Hq, nQ, nK]; -inf where no pair is visible."""
    a, b = means(q, blocks[0]), means(k, blocks[1])
    group = q.shape[2] // k.shape[2]
    scores = scale * torch.einsum("bihd,bjhd->bhij", a, b.repeat_interleave(group, 2))
    for i in range(a.shape[1]):
        last = min((i + 1) * blocks[0], q.shape[1]) - 1 + k.shape[1] - q.shape[1]
        for j in range(b.shape[1]):
            if causal and j * blocks[1] > last:
                scores[:, :, i, j] = -INF
    return scores


def tokens_of(blocks, q, k, sizes, causal):
    """Bool [B, H, Lq, Lkv] of a block map."""
    dense = blocks.repeat_interleave(sizes[0], 2).repeat_interleave(sizes[1], 3)
    dense = dense[:, :, : q.shape[1], : k.shape[1]]
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    return dense & (j <= i + k.shape[1] - q.shape[1]) if causal else dense


def are_the_largest(chosen, scores):
    """No chosen score is below one that is not chosen."""
    if chosen.any() and not chosen.all():
        assert scores[chosen].min() >= scores[~chosen].max() - CLOSE


@st.composite
def inputs(draw):
    q_len, kv_len = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    heads, heads_kv = draw(st.sampled_from([(1, 1), (4, 2), (2, 2)]))
    batch, seed = draw(st.integers(1, 2)), draw(st.integers(0, 99))
    q = normal(batch, q_len, heads, 16, seed=seed) * 2
    return q, normal(batch, kv_len, heads_kv, 16, seed=seed + 1) * 2


@FEW
@given(inputs(), st.integers(0, 8), st.booleans(), st.sampled_from([(64, 64), (128, 32)]))
def test_minference(tensors, top_k, causal, sizes):
    q, k = tensors
    options = {"causal": causal, "block_q": sizes[0], "block_kv": sizes[1]}
    mask = patterns.minference_block_sparse(q, k, top_k=top_k, **options)
    mask.validate()
    scores, blocks = products(q, k, sizes, causal), mask.blocks()
    for row, chosen in zip(scores.flatten(0, 2), blocks.flatten(0, 2), strict=True):
        there = row > -INF
        assert chosen.sum() == min(top_k, there.sum())
        assert not (chosen & ~there).any()
        are_the_largest(chosen[there], row[there])
    assert torch.equal(mask.to_dense(), tokens_of(blocks, q, k, sizes, causal))


def test_minference_by_default():
    """Blocks of 64 and the top 100."""
    q = normal(1, 7000, 1, 8)
    mask = patterns.minference_block_sparse(q, q)
    assert (mask.block_q, mask.block_kv, mask.causal) == (64, 64, True)
    assert mask.counts[0, 0].tolist() == [min(n + 1, 100) for n in range(110)]


@FEW
@given(
    inputs(),
    st.sampled_from([0, 0.3, 0.9, 1]),
    st.booleans(),
    st.sampled_from([None, 0.5]),
    st.sampled_from([(128, 128), (64, 32)]),
)
def test_flexprefill(tensors, gamma, causal, scale, sizes):
    """The smallest set of the whole map that has the share gamma of all rows' mass."""
    q, k = tensors
    options = {"causal": causal, "scale": scale, "block_q": sizes[0], "block_kv": sizes[1]}
    options["gamma"] = gamma
    mask = patterns.flexprefill_query_aware(q, k, forced=False, **options)
    mask.validate()
    scores = products(q, k, sizes, causal, 0.25 if scale is None else scale)
    rows = scores.flatten(0, 1)
    for head, chosen in zip(rows, mask.blocks().flatten(0, 1), strict=True):
        some = (head > -INF).any(-1)
        shares = head[some].softmax(-1).flatten()
        assert not chosen[~some].any()
        if not len(shares):
            continue
        chosen = chosen[some].flatten()
        mass = shares[chosen].sum()
        assert mass >= gamma * some.sum() - 1e-4
        assert mass - shares[chosen].min() <= gamma * some.sum() + 1e-4
        are_the_largest(chosen, shares)
    blocks = mask.blocks().clone()
    blocks[..., 0] = True
    shift = k.shape[1] - q.shape[1]
    for i in range(q.shape[1]):
        if 0 <= i + shift < k.shape[1]:
            blocks[:, :, i // sizes[0], (i + shift) // sizes[1]] = True
    forced = patterns.flexprefill_query_aware(q, k, **options)
    assert torch.equal(forced.to_dense(), tokens_of(blocks, q, k, sizes, causal))


def sides(side, regions):
    """Which region a coordinate is in: runs of ceil(side / regions)."""
    size = -(-side // regions)
    return [n for n in range(regions) for _ in range(size)][:side]


@FEW
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from([(64, 16), (64, 64), (128, 32)]),
    st.sampled_from([(1, 1), (4, 2)]),
    st.booleans(),
    st.integers(0, 99),
)
@example(3, 11, 1, 1, (64, 16), (1, 1), False, 0)  # regions of several blocks and a part
def test_biformer(height, width, count, top_k, sizes, heads, per_head, seed):
    region = patterns.image_regions(height, width, count)
    expected = [y * count + x for y in sides(height, count) for x in sides(width, count)]
    assert region.tolist() == expected
    q = normal(2, height * width, heads[0], 8, seed=seed)
    k = normal(2, height * width, heads[1], 8, seed=seed + 1)
    layout = patterns.BiFormerLayout(region, block_q=sizes[0], block_kv=sizes[1])
    mask = patterns.biformer(q, k, layout, top_k=top_k, per_head=per_head)
    mask.validate()
    assert mask.shape[:2] == (2, heads[0] if per_head else 1)
    dense = mask.to_dense()
    assert not dense[..., ~layout.keys.present.flatten()].any()  # padding is seen by none
    dense = dense[:, :, layout.queries.slots][..., layout.keys.slots]
    numbers = sorted(set(expected))
    averages = [
        torch.stack([x[:, region == n].double().mean(1) for n in numbers], 1) for x in (q, k)
    ]
    wide = averages[1].repeat_interleave(heads[0] // heads[1], 2)
    scores = torch.einsum("brhd,bshd->bhrs", averages[0], wide)
    scores = scores if per_head else scores.sum(1, keepdim=True)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).view(-1, 3).tolist():
        rows = dense[b, h, region == numbers[r]]
        assert (rows == rows[0]).all()
        chosen = torch.stack([rows[0, region == n].any() for n in numbers])
        assert chosen.sum() == min(top_k, len(numbers))
        are_the_largest(chosen, scores[b, h, r])
        assert torch.equal(rows[0], chosen[[numbers.index(n) for n in expected]])


@pytest.mark.parametrize("block_kv", [16, 64])
def test_biformer_attention(block_kv, agrees):
    """There and back again: attention between regions, in the image's order."""
    height, width = 19, 23
    q, k, v = (normal(1, height * width, heads, 32, seed=heads) for heads in (4, 2, 2))
    region = patterns.image_regions(height, width, 3)
    layout = patterns.BiFormerLayout(region, block_kv=block_kv)
    mask = patterns.biformer(q, k, layout, top_k=4)
    permuted = layout.queries.permute(q), layout.keys.permute(k), layout.keys.permute(v)
    results = block_sparse_attention(*permuted, mask, return_lse=True)
    out, lse = (layout.queries.undo(result) for result in results)
    visible = mask.to_dense()[:, :, layout.queries.slots][..., layout.keys.slots]
    agrees(out, lse, q, k, v, visible)
    assert reference.attention(q, k, v, visible)[0].shape == out.shape


@pytest.mark.parametrize(
    ("height", "width", "count", "top_k", "heads", "per_head", "sizes"),
    [
        (28, 28, 7, 4, (4, 4), False, (64, 16)),  # stages of BiFormer at 224 pixels
        (14, 14, 7, 16, (8, 8), False, (64, 16)),
        (7, 7, 7, 49, (2, 2), False, (64, 16)),
        (32, 32, 8, 4, (2, 1), True, (128, 64)),  # the third one at 512
        (13, 9, 4, 3, (4, 2), True, (64, 32)),  # regions of several sizes
    ],
)
def test_biformer_packed(height, width, count, top_k, heads, per_head, sizes, agrees):
    """The attention of `biformer`, without padding, and its gradients."""
    region = patterns.image_regions(height, width, count)
    q, k, v = (
        normal(2, height * width, h, 32, seed=n).requires_grad_()
        for n, h in enumerate((heads[0], heads[1], heads[1]))
    )
    packing = patterns.BiFormerPacking(region, block_q=sizes[0], block_kv=sizes[1])
    order = packing.order
    with Watch():
        mask = patterns.biformer_packed(q, k, packing, top_k=top_k, per_head=per_head)
    mask.validate()
    assert mask.partial_indices.shape[3] <= -(-height * width // sizes[1])
    assert (mask.q_len, mask.kv_len) == (height * width, height * width)
    layout = patterns.BiFormerLayout(region)
    padded = patterns.biformer(q, k, layout, top_k=top_k, per_head=per_head).to_dense()
    visible = padded[:, :, layout.queries.slots][..., layout.keys.slots]
    assert mask.to_dense()[:, :, order.slots][..., order.slots].equal(visible)
    permuted = (order.permute(x) for x in (q, k, v))
    results = block_sparse_attention(*permuted, mask, return_lse=True)
    out, lse = (order.undo(result) for result in results)
    agrees(out.detach(), lse.detach(), *(x.detach() for x in (q, k, v)), visible)
    weight = normal(*out.shape, seed=9)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wide = (x.repeat_interleave(heads[0] // heads[1], 2) for x in (k, v))
    keys, values = wide
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * 32**-0.5
    shares = scores.masked_fill(~visible, -INF).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", shares, values)
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)


@FEW
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=150),
    st.integers(1, 11),
    st.sampled_from([(64, 16), (64, 32), (128, 64), (64, 128)]),
    st.sampled_from([(1, 1), (4, 2)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_regions_packed(regions, top_k, sizes, heads, per_head, seed):
    """Regions of any sizes, some empty, some with equal scores: what each token sees, by
    definition."""
    region = torch.tensor(regions)
    tokens, count = len(regions), 10
    q, k = (
        torch.randint(
            -2, 3, (2, tokens, h, 4), generator=torch.Generator().manual_seed(seed + n)
        ).float()
        for n, h in enumerate(heads)
    )
    packing = patterns.BiFormerPacking(region, regions=count, block_q=sizes[0], block_kv=sizes[1])
    mask = patterns.biformer_packed(q, k, packing, top_k=top_k, per_head=per_head)
    mask.validate()
    seen = mask.to_dense()[:, :, packing.order.slots][..., packing.order.slots]
    own = [(region == r).nonzero()[:, 0] for r in range(count)]
    group = heads[0] // heads[1]
    for b in range(2):
        for h in range(heads[0] if per_head else 1):
            chosen = range(h, h + 1) if per_head else range(heads[0])
            for queries in own:
                if not len(queries):
                    continue
                scores = torch.full((count,), -INF, dtype=torch.float64)
                for s, keys in enumerate(own):
                    if len(keys):
                        scores[s] = sum(
                            q[b, queries, n].double().mean(0)
                            @ k[b, keys, n // group].double().mean(0)
                            for n in chosen
                        )
                last = scores.sort(descending=True).values[min(top_k, count) - 1]
                sure = (scores > last + 1e-4) & (scores > -INF)
                maybe = (scores >= last - 1e-4) & (scores > -INF)
                columns = seen[b, h if per_head else 0, queries]
                assert columns.eq(columns[:1]).all()
                whole = torch.stack([columns[0, i].all() & torch.tensor(len(i) > 0) for i in own])
                some = torch.stack([columns[0, i].any() for i in own])
                assert whole.equal(some)  # regions are seen as a whole
                assert (whole | ~sure).all()
                assert (maybe | ~whole).all()
                assert whole.sum() == min(top_k, int((scores > -INF).sum()))


@FEW
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([None, 7, 9]),
)
def test_region_order(regions, block, count):
    """Any partition: regions in order, each from a block's start, and back."""
    order = patterns.RegionOrder(torch.tensor(regions), block, regions=count)
    x = normal(2, len(regions), 3, 4)
    permuted = order.permute(x)
    assert torch.equal(order.undo(permuted), x)
    expected = []
    for region in range(max(regions) + 1 if count is None else count):
        own = [x[:, n] for n, r in enumerate(regions) if r == region]
        own += [torch.zeros(2, 3, 4)] * (-len(own) % block)
        expected += own
        assert order.sizes[region] == regions.count(region)
        mean = sum(own) / max(1, regions.count(region)) if own else torch.zeros(2, 3, 4)
        torch.testing.assert_close(order.means(x)[:, region], mean)
    assert torch.equal(permuted, torch.stack(expected, 1))
    assert order.padded == (len(expected) > len(regions))
    assert order.length == len(expected)
    assert order.present.sum() == len(regions)
    x.requires_grad_()
    order.undo(order.permute(x)).square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


P, Q = patterns, normal(1, 64, 2, 8)
LAYOUT = patterns.BiFormerLayout(patterns.image_regions(8, 8, 2))
PACKING = patterns.BiFormerPacking(patterns.image_regions(8, 8, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: P.minference_block_sparse(Q, Q, top_k=-1),
            ValueError,
            "k must be at least 0, got -1",
        ),
        (
            lambda: P.minference_block_sparse(Q, Q[0]),
            ValueError,
            r"k must have .*, got .*\[64, 2, 8\]",
        ),
        (
            lambda: P.minference_block_sparse(Q, Q, block_q=96),
            ValueError,
            "block_q must be 64 or 128, got 96",
        ),
        (
            lambda: P.minference_block_sparse(Q.int(), Q),
            TypeError,
            "q must have .*dtype.*, got torch.int32",
        ),
        (
            lambda: P.minference_block_sparse(Q[:, :, :1], Q),
            ValueError,
            "heads of q must be a multiple of those of k, got 1 and 2",
        ),
        (
            lambda: P.flexprefill_query_aware(Q, Q, gamma=1.1),
            ValueError,
            "gamma must be from 0 to 1.*, got 1.1",
        ),
        (
            lambda: P.flexprefill_query_aware(Q, Q, gamma="a"),
            TypeError,
            "gamma must be a number, got 'a'",
        ),
        (
            lambda: P.flexprefill_query_aware(Q, Q, forced=1),
            TypeError,
            "forced must be True or False, got 1",
        ),
        (
            lambda: P.flexprefill_query_aware(Q, Q, causal=0),
            TypeError,
            "causal must be True or False, got 0",
        ),
        (lambda: P.image_regions(0, 4), ValueError, "height must be at least 1, got 0"),
        (lambda: P.biformer(Q, Q, LAYOUT, top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (
            lambda: P.biformer(Q, Q, LAYOUT, top_k=1, per_head=2),
            TypeError,
            "per_head must be True or False, got 2",
        ),
        (
            lambda: P.biformer(Q[:, 1:], Q, LAYOUT, top_k=1),
            ValueError,
            r"x must have 64 tokens, got shape \[1, 63, 2, 8\]",
        ),
        (
            lambda: P.BiFormerPacking(torch.arange(8), block_q=32),
            ValueError,
            "block_q must be .*, got 32",
        ),
        (
            lambda: P.biformer_packed(Q, Q, LAYOUT, top_k=1),
            TypeError,
            "layout must be a BiFormerPacking, got BiFormerLayout",
        ),
        (
            lambda: P.biformer_packed(Q[:, 1:], Q, PACKING, top_k=1),
            ValueError,
            r"x must have 64 tokens, got shape \[1, 63, 2, 8\]",
        ),
        (
            lambda: P.BiFormerPacking(torch.arange(8), block_kv=8),
            ValueError,
            "block_kv must be .*, got 8",
        ),
        (
            lambda: P.biformer_packed(Q, Q, PACKING, top_k=0),
            ValueError,
            "top_k must be at least 1, got 0",
        ),
        (
            lambda: P.RegionOrder(torch.ones(3), 4),
            TypeError,
            r"region must be a tensor of integers, got torch\.float32",
        ),
        (
            lambda: P.RegionOrder(torch.ones(0).int(), 4),
            ValueError,
            r"region must have .*, got .*\[0\]",
        ),
        (
            lambda: P.RegionOrder(torch.tensor([0, -1]), 4),
            ValueError,
            "region must be from 0 to 0, got -1 to 0",
        ),
        (
            lambda: P.RegionOrder(torch.tensor([0, 2]), 4, regions=2),
            ValueError,
            "region must be from 0 to 1, got 0 to 2",
        ),
        (
            lambda: P.RegionOrder(torch.tensor([0]), 0),
            ValueError,
            "block must be at least 1, got 0",
        ),
        (
            lambda: LAYOUT.queries.undo(Q[:, 1:]),
            ValueError,
            r"x must have 256 tokens, got shape \[1, 63, 2, 8\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
