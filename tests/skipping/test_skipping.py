"""Softmax skipping: the fp64 reference over the same groups and tiles skips the same tiles.

Which rows and keys go together is worked out here from docs/design.md, "Skipping".
"""

import dataclasses
import itertools

import block_masks
import pytest
import torch
from op_calls import CALLS, SKIPPING, run

import sparse_fmha
from sparse_fmha import BlockMask, SkipStats, StripeMask, reference

_C = pytest.importorskip("sparse_fmha._C")
TILE_K = {64: 80, 128: 80, 256: 80}  # keys of a tile of the dense kernels, by head dim


def inputs(length=500, kv=None, heads=4, heads_kv=2, dim=64, batch=2, seed=0):
    """All queries of a head look in one direction, along which runs of 30 keys lie together, so
    that rows agree on what is small; scores spread over some ten natural log units."""
    generator = torch.Generator().manual_seed(seed)
    kv = length if kv is None else kv

    def randn(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    way = torch.nn.functional.normalize(randn(1, heads_kv, dim), dim=-1)
    along = randn(-(-kv // 30), heads_kv, 1).repeat_interleave(30, 1)[:, :kv]
    q = dim**0.5 * way.repeat_interleave(heads // heads_kv, 2) + 0.1 * randn(length, heads, dim)
    k = 4 * along * way + 0.1 * randn(kv, heads_kv, dim)
    return q, k, randn(kv, heads_kv, dim)


def check(function, q, k, v, visible, groups, tiles, threshold, *args, **kwargs):
    """`tiles` [heads, groups, Lkv] ranks the keys; -1 for keys that are in no tile."""
    out, lse, stats = function(
        q, k, v, *args, skip_threshold=threshold, return_lse=True, return_stats=True, **kwargs
    )
    heads = q.shape[-2]
    visible = visible.expand(q.shape[0], heads, *visible.shape[-2:])
    flat = [x.flatten(1, -3) for x in (q, k, v)]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in flat[1:])
    for h in range(heads):
        one = slice(h, h + 1)
        ranks = tiles[min(h, len(tiles) - 1)]
        last = ranks.amax(1, keepdim=True) + 1  # unseen keys behind all others
        ranks = torch.where(ranks < 0, last, ranks)
        wanted, wanted_lse, skipped = reference.skip_attention(
            flat[0][:, :, one],
            k[:, :, one],
            v[:, :, one],
            visible[:, one],
            threshold,
            groups,
            ranks,
            kwargs.get("scale"),
        )
        torch.testing.assert_close(out.flatten(1, -3)[:, :, one], wanted)
        torch.testing.assert_close(
            lse.flatten(1, -2)[:, :, one].double(), wanted_lse, rtol=1e-6, atol=1e-5
        )
        assert stats.skipped[:, h].tolist() == skipped[:, 0].sum((1, 2)).tolist()
        pairs = torch.zeros(len(q), int(groups.max()) + 1, int(ranks.max()) + 1)
        for g in range(pairs.shape[1]):
            seen = visible[:, h, groups == g].any(1)
            pairs[:, g] = pairs[:, g].index_add(1, ranks[g], seen.float())
        assert stats.visited[:, h].tolist() == (pairs > 0).sum((1, 2)).tolist()
    return stats


def rows(length):
    return torch.arange(length) // 64


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("length", "kv"), [(500, 500), (130, 500), (500, 130), (64, 1000)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.3])
def test_attention(threshold, causal, length, kv, dim):
    q, k, v = inputs(length, kv, dim=dim)
    visible = reference.causal_mask(length, kv) if causal else torch.ones(length, kv).bool()
    tiles = reference.tile_ranks(kv, TILE_K[dim], descending=True)
    tiles = tiles.expand(1, -(-length // 64), -1)
    stats = check(
        sparse_fmha.attention, q, k, v, visible, rows(length), tiles, threshold, causal=causal
    )
    assert (stats.skipped == 0).all() if threshold == 0 else True
    if threshold == 0.3 and kv > 130:
        assert (stats.skipped > 0).any()
        assert (stats.skipped < stats.visited).all()


@pytest.mark.parametrize(
    ("grid", "window", "options"),
    [
        ((700,), (300,), {}),
        ((700,), (257,), {"stride": 16, "causal": True}),
        ((24, 40), (11, 15), {"stride": (2, 3)}),
        ((24, 40), (9, 9), {"dilation": (2, 3), "causal": (True, False)}),
        ((8, 9, 16), (4, 5, 7), {}),
        ((24, 40), (11, 15), {"extra": 100}),
        ((400,), (150,), {"extra": 128}),
    ],
)
@pytest.mark.parametrize("threshold", [1e-3, 0.3])
def test_neighborhood(threshold, grid, window, options):
    options = dict(options)
    extra = options.pop("extra", 0)
    q, k, v = (x.unflatten(1, grid) for x in inputs(torch.Size(grid).numel(), dim=128, batch=1))
    more = inputs(extra, dim=128, batch=1, seed=1)[1:] if extra else (None, None)
    groups, tiles = neighborhood_tiles(grid, window, extra, **options)
    visible = reference.neighborhood_mask(grid, window, extra=extra, **options)
    if extra:

        def function(q, k, v, *args, **kwargs):
            # The reference has the extra tokens behind the grid's.
            length = torch.Size(grid).numel()
            k, v = (x[:, :length].unflatten(1, grid) for x in (k, v))
            return sparse_fmha.neighborhood_attention(
                q, k, v, *args, extra_k=more[0], extra_v=more[1], **kwargs
            )

        k, v = (torch.cat([x.flatten(1, -3), y], 1) for x, y in zip((k, v), more, strict=True))
    else:
        function = sparse_fmha.neighborhood_attention
    stats = check(function, q, k, v, visible, groups, tiles, threshold, window, **options)
    if threshold == 0.3:
        assert (stats.skipped > 0).any()


def neighborhood_tiles(grid, window, extra, stride=1, dilation=1, causal=False):
    """Halves of the 128-row boxes, and the key boxes in the order of the walk."""
    axes = len(grid)
    simulated = sparse_fmha.simulate(
        grid, window, stride=stride, dilation=dilation, causal=causal, head_dim=128, extra=extra
    )
    shape_q, shape_k = simulated.tile_q, simulated.tile_k

    def triple(value, filler):
        value = value if isinstance(value, tuple) else (value,) * axes
        return (filler,) * (3 - axes) + tuple(value)

    grid3 = triple(grid, 1)
    walk = _C.walks.Neighborhood(
        grid3, triple(window, 1), triple(stride, 1), triple(dilation, 1),
        tuple(int(c) for c in triple(causal, False)), triple(shape_q, 1), triple(shape_k, 1),
    )  # fmt: skip
    shape_q, shape_k = triple(shape_q, 1), triple(shape_k, 1)
    length = torch.Size(grid).numel()
    groups = torch.full((length,), -1)
    tiles = []

    def tokens(residue, origin, shape):
        """Token numbers of a box in row-major order; None where there is none."""
        for offset in itertools.product(*(range(n) for n in shape)):
            at = walk.token(residue, tuple(o + i for o, i in zip(origin, offset, strict=True)))
            inside = all(c < n for c, n in zip(at, grid3, strict=True))
            yield (at[0] * grid3[1] + at[1]) * grid3[2] + at[2] if inside else None

    whole = extra // 128 * 128
    for i in range(walk.num_query_tiles()):
        residue, origin = walk.query_tile(i)
        ranks = torch.full((length + extra,), -1)
        ranks[length + whole :] = 0
        boxes = walk.walk(i)[2]
        for rank, box in enumerate(boxes):
            places = [t for t in tokens(residue, box, shape_k) if t is not None]
            ranks[places] = rank + 1
        for n in range(0, whole, 128):
            ranks[length + n : length + n + 128] = len(boxes) + 1 + n // 128
        members = list(tokens(residue, origin, shape_q))
        for half in (members[:64], members[64:]):
            there = [t for t in half if t is not None]
            if there:
                groups[there] = len(tiles)
                tiles.append(ranks)
    assert (groups >= 0).all()
    return groups, torch.stack(tiles)[None]


@pytest.mark.parametrize("blocks", [(64, 16), (64, 128), (128, 32), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("threshold", "dim", "tile_k"), [(1e-3, 128, 128), (0.3, 96, 128), (0.3, 136, 32)]
)
def test_block_sparse(threshold, dim, tile_k, causal, blocks):
    drawn = block_masks.Drawn(450, 600, *blocks, 2, 2, causal, kinds=(0.3, 0.5, 0.2))
    mask, visible = drawn.mask(), drawn.dense()
    q, k, v = inputs(450, 600, heads=2, heads_kv=1, dim=dim)
    for b in range(2):
        one = dataclasses.replace(drawn, seed=0)
        tiles = torch.stack([block_tiles(mask, b, h, tile_k) for h in range(2)])
        part = BlockMask(
            *(mask.counts[b : b + 1], mask.indices[b : b + 1], *one.sizes),
            causal=causal,
            partial_counts=mask.partial_counts[b : b + 1],
            partial_indices=mask.partial_indices[b : b + 1],
            partial_bits=mask.partial_bits[b : b + 1],
        )
        given = (x[b : b + 1] for x in (q, k, v))
        stats = check(
            sparse_fmha.block_sparse_attention, *given, visible[b : b + 1], rows(450), tiles,
            threshold, part,
        )  # fmt: skip
        if threshold == 0.3:
            assert (stats.skipped > 0).any()


def block_tiles(mask, b, h, tile_k):
    """Stages of `tile_k` keys for each 64 rows of one head, [groups, Lkv]."""
    result = []
    for group in range(-(-mask.q_len // 64)):
        row = group * 64 // mask.block_q

        def listed(counts, indices, row):
            return indices[b, h, row, : counts[b, h, row]].tolist() if row < mask.blocks_q else []

        full = listed(mask.counts, mask.indices, row)
        partial = listed(mask.partial_counts, mask.partial_indices, row)
        if mask.block_q == 64:
            other = listed(mask.counts, mask.indices, row ^ 1)
            streams = [sorted(set(full) & set(other)), partial + sorted(set(full) - set(other))]
        else:
            streams = [partial + full]
        firsts = [[block * mask.block_kv for block in stream] for stream in streams]
        result.append(ranked(firsts, tile_k, mask.block_kv, mask.kv_len))
    return torch.stack(result)


def ranked(streams, tile_k, size, kv_len):
    """Ranks of keys, where tiles hold runs of `size` keys, or parts; each stream ends a tile."""
    ranks, rank = torch.full((kv_len,), -1), 0
    part = min(size, tile_k)
    for stream in streams:
        parts = [first + n for first in stream for n in range(0, size, part)]
        for i in range(0, len(parts), tile_k // part):
            for first in parts[i : i + tile_k // part]:
                ranks[first : first + part] = rank
            rank += 1
    return ranks


@pytest.mark.parametrize("range_size", [None, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("threshold", "dim", "tile_k"), [(1e-3, 128, 128), (0.3, 96, 128), (0.3, 136, 32)]
)
def test_stripe(threshold, dim, tile_k, causal, range_size):
    generator = torch.Generator().manual_seed(1)
    length, groups = 600, 3
    columns = torch.stack([torch.randperm(300, generator=generator)[:250] for _ in range(groups)])
    columns = columns.sort(-1).values.int()[None, None]
    counts = torch.tensor([250, 170, 3]).int()[None, None]
    ranges = {}
    if range_size is not None:
        starts = torch.tensor([[301, 440, -1], [310, -1, -1], [470, 300, 380]]).int()
        if range_size == 128:
            starts[:, 2:] = -1
        number = (starts >= 0).sum(-1).int()
        ranges = dict(range_starts=starts[None, None], range_counts=number[None, None])
    mask = StripeMask(
        columns, counts, length, length, 256, causal=causal, range_size=range_size or 64, **ranges
    )
    q, k, v = inputs(length, dim=dim)
    tiles = []
    for group in range(-(-length // 64)):
        at = group * 64 // 256
        runs = starts[at, : number[at]].tolist() if ranges else []
        ranks = ranked([runs], tile_k, range_size or 64, length)
        listed = columns[0, 0, at, : counts[0, 0, at]].long()
        for i in range(0, len(listed), tile_k):
            ranks[listed[i : i + tile_k]] = ranks.max() + 1
        tiles.append(ranks)
    stats = check(
        sparse_fmha.stripe_attention, q, k, v, mask.to_dense(), rows(length),
        torch.stack(tiles)[None], threshold, mask,
    )  # fmt: skip
    if threshold == 0.3:
        assert (stats.skipped > 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    """Nothing near the threshold here: the same tiles as in fp64 of the same numbers."""
    q, k, v = (x.to(dtype) for x in inputs())
    exact = [x.double() for x in (q, k, v)]
    kwargs = dict(causal=True, skip_threshold=0.1, return_stats=True)
    out, stats = sparse_fmha.attention(q, k, v, **kwargs)
    wanted, wanted_stats = sparse_fmha.attention(*exact, **kwargs)
    assert stats.skipped.sum() > 0
    assert stats.visited.equal(wanted_stats.visited)
    assert (stats.skipped - wanted_stats.skipped).abs().sum() <= 1
    if stats.skipped.equal(wanted_stats.skipped):
        torch.testing.assert_close(out, wanted.to(dtype))


def test_a_threshold_for_each_batch_entry():
    q, k, v = inputs(batch=3)
    each = [0.0, 0.01, 0.5]
    given = torch.tensor(each)
    together = sparse_fmha.attention(q, k, v, skip_threshold=given, return_stats=True)
    for b, threshold in enumerate(each):
        one = (x[b : b + 1] for x in (q, k, v))
        out, stats = sparse_fmha.attention(*one, skip_threshold=threshold, return_stats=True)
        assert out.equal(together[0][b : b + 1])
        assert stats.skipped.equal(together[1].skipped[b : b + 1])
    assert together[1].skipped[0].sum() == 0
    assert together[1].skipped[2].sum() > 0


def test_values_out_of_range_are_held_to_it():
    q, k, v = inputs(batch=4)
    odd = torch.tensor([-1.0, float("nan"), 1.0, 7.0])
    held = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24])
    odd, held = (
        sparse_fmha.attention(q, k, v, skip_threshold=t, return_stats=True) for t in (odd, held)
    )
    assert odd[0].equal(held[0])
    assert odd[1].skipped.equal(held[1].skipped)
    assert odd[1].skipped[:2].sum() == 0
    assert odd[1].skipped[2:].sum() > 0


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-30])
def test_scales(scale):
    q, k, v = inputs()
    tiles = reference.tile_ranks(500, 80, descending=True).expand(1, 8, -1)
    every = torch.ones(500, 500, dtype=torch.bool)
    stats = check(sparse_fmha.attention, q, k, v, every, rows(500), tiles, 0.2, scale=scale)
    assert bool((stats.skipped > 0).any()) == (scale == -0.2)


def test_results_and_counts():
    q, k, v = inputs(length=300)
    plain = sparse_fmha.attention(q, k, v, return_lse=True)
    out, lse, stats = sparse_fmha.attention(q, k, v, return_lse=True, return_stats=True)
    torch.testing.assert_close((out, lse), plain)
    assert isinstance(stats, SkipStats)
    assert stats.visited.tolist() == [[5 * 4] * 4] * 2
    assert stats.sparsity.tolist() == [[0.0] * 4] * 2
    out, stats = sparse_fmha.attention(q, k[:, :0], v[:, :0], return_stats=True, skip_threshold=0.1)
    assert out.eq(0).all()
    assert stats.visited.tolist() == stats.skipped.tolist() == [[0] * 4] * 2
    assert stats.sparsity.eq(0).all()
    empty = (x[:0] for x in (q, k, v))
    out, stats = sparse_fmha.attention(*empty, return_stats=True, skip_threshold=0.1)
    assert out.shape == (0, 300, 4, 64)
    assert stats.visited.shape == (0, 4)


def calls():
    q, k, v = (x.float() for x in inputs(length=128, dim=64))
    mask = BlockMask.from_blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), 128, 128, 128, 128)
    stripes = StripeMask.from_columns(torch.ones(1, 1, 1, 128, dtype=torch.bool), 128, 128)
    return {
        "attention": (sparse_fmha.attention, (q, k, v)),
        "neighborhood": (sparse_fmha.neighborhood_attention, (q, k, v, 40)),
        "block_sparse": (sparse_fmha.block_sparse_attention, (q, k, v, mask)),
        "stripe": (sparse_fmha.stripe_attention, (q, k, v, stripes)),
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    [
        (1.0, ValueError, r"skip_threshold is 1.0; 0 <= skip_threshold < 1 is needed"),
        (-0.5, ValueError, r"skip_threshold is -0.5; 0 <= skip_threshold < 1 is needed"),
        (float("nan"), ValueError, r"skip_threshold is nan; 0 <= skip_threshold < 1 is needed"),
        ("0", TypeError, r"skip_threshold is '0'; a number or a tensor is needed"),
        (True, TypeError, r"skip_threshold is True; a number or a tensor is needed"),
        (torch.zeros(3), ValueError, r"skip_threshold has shape \[3\]; \[2\] is needed"),
        (torch.zeros(2).double(), TypeError, r"skip_threshold has dtype torch.float64; .*float32"),
        (torch.zeros(2, device="meta"), ValueError, r"skip_threshold is on meta, q on cpu"),
    ],
)
def test_errors(name, threshold, error, message):
    function, args = calls()[name]
    with pytest.raises(error, match=message):
        function(*args, skip_threshold=threshold)


@pytest.mark.parametrize("name", calls())
def test_ops(name):
    """opcheck, torch.compile and autocast of the op behind each function."""
    function, args = calls()[name]
    threshold = torch.full((2,), 0.01)

    def run(q, k, v, threshold):
        return function(
            q, k, v, *args[3:], skip_threshold=threshold, return_lse=True, return_stats=True
        )

    eager = run(*args[:3], threshold)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*args[:3], threshold)
    for a, b in zip([*eager[:2], *eager[2]], [*compiled[:2], *compiled[2]], strict=True):
        assert a.equal(b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, stats = run(*args[:3], threshold)
    assert out.dtype == torch.bfloat16
    assert stats.visited.equal(eager[2].visited)
    with pytest.raises(NotImplementedError, match=r"_fwd has no backward pass yet"):
        run(args[0].clone().requires_grad_(), *args[1:3], threshold)[0].sum().backward()


def test_opcheck():
    q, k, v = (x.float() for x in inputs(length=70, dim=16))
    ops = torch.ops.sparse_fmha
    counts, indices = torch.ones(1, 1, 1).int(), torch.zeros(1, 1, 1, 1).int()
    for op, rest in (
        (ops.fmha_fwd, (True, None)),
        (ops.neighborhood_fwd, ([9], [1], [1], [0])),
        (ops.block_sparse_fwd, (counts, indices, None, None, None, 128, 128)),
        (ops.stripe_fwd, (indices, counts, None, None, 128)),
    ):
        for threshold in (None, torch.full((2,), 0.1)):
            torch.library.opcheck(op, (q, k, v, *rest), {"skip_threshold": threshold})


@pytest.mark.parametrize("name", [name for name in CALLS if name.endswith("_fwd")])
def test_results_of_ops(name):
    """A pair; with a threshold the tiles, too, of which 0 leaves out nothing."""
    plain, skipping = run(name), run(name + SKIPPING)
    assert len(plain) == 2
    out, lse, tiles = run(name + SKIPPING, skip_threshold=torch.zeros(2))
    torch.testing.assert_close((out, lse), plain)
    assert tiles.dtype == torch.int64
    assert tiles.shape == skipping[2].shape == (2, 2, 2)
    assert tiles[..., 0].min() > 0
    assert not tiles[..., 1].any()
    assert skipping[2][..., 0].equal(tiles[..., 0])


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (torch.zeros(3), r"skip_threshold has shape \[3\]; \[2\] is needed"),
        (torch.zeros(2).double(), r"skip_threshold has a dtype other than float32"),
        (torch.zeros(4)[::2], r"skip_threshold is not contiguous"),
    ],
)
@pytest.mark.parametrize("name", [name for name in CALLS if name.endswith(SKIPPING)])
def test_raw_op_errors(name, threshold, message):
    with pytest.raises(RuntimeError, match=message):
        run(name, skip_threshold=threshold)
