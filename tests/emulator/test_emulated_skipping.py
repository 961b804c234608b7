"""Forward kernels that skip key tiles, on the emulator, against the definition in fp64."""

import contextlib
import functools

import block_masks
import pytest
import skip_cases
import torch
from poison import poisoned
from skip_lists import block_tiles, stripe_tiles
from skip_windows import neighborhood_tiles

import sparse_fmha
from sparse_fmha import StripeMask, reference

OPS = torch.ops.sparse_fmha
BF16 = torch.bfloat16
TILE = 80  # keys that are skipped together, the last ones first (docs/design.md, Skipping)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_tiles_are_skipped(causal, threshold):
    length = 450
    given = skip_cases.inputs(length, heads=2, heads_kv=1, dim=128, batch=1)
    q, k, v = (x.to(BF16) for x in given)
    with sparse_fmha.arch_override("sm90"), poisoned():  # sm80 has no such rows
        out, lse, stats = sparse_fmha.attention(
            q, k, v, causal=causal, skip_threshold=threshold, return_lse=True, return_stats=True
        )
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    groups = skip_cases.rows(length)
    ranks = reference.tile_ranks(length, TILE, descending=True)
    exact, exact_lse, skipped = reference.skip_attention(q, k, v, visible, threshold, groups, ranks)
    assert stats.skipped.equal(skipped.sum((2, 3)))
    assert bool(stats.skipped.any()) == (threshold > 0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4)
    assert (out - exact).abs().max() <= 2 * torch.finfo(BF16).eps * exact.abs().max()


def tiles_of(bits, groups, tiles):
    """The tiles of a saved tensor, as booleans [B, H, groups, tiles]; its other bits are zero."""
    places = torch.arange(32, dtype=torch.int32)
    found = (bits[..., None] >> places & 1).flatten(-2).bool()
    assert bits.shape[2] == groups
    assert not found[..., tiles:].any()
    return found[..., :tiles]


@pytest.mark.parametrize("keys", [70, 2700, 33 * TILE, 65 * TILE - 3])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_skipped_is_saved(causal, keys):
    """One word of 32 tiles and several; the last one full, or of one tile."""
    queries = min(keys, 100)
    q, k, v = skip_cases.inputs(queries, keys, heads=2, heads_kv=1, dim=128, batch=1)
    q, k, v = (x.to(BF16) for x in (q, k, v))
    threshold = torch.full((1,), 0.3)
    with sparse_fmha.arch_override("sm90"), poisoned():
        plain = OPS.fmha_fwd(q, k, v, causal, None, threshold)
        saving = OPS.fmha_fwd(q, k, v, causal, None, threshold, save_skipped=True)
    assert len(plain) == 3
    assert all(a.equal(b) for a, b in zip(plain, saving[:3], strict=True))
    saved = tiles_of(saving[3], groups=-(-queries // 64), tiles=-(-keys // TILE))
    visible = torch.ones(queries, keys, dtype=torch.bool)
    visible = visible.tril(keys - queries) if causal else visible
    ranks = reference.tile_ranks(keys, TILE, descending=True)
    _, _, skipped = reference.skip_attention(q, k, v, visible, 0.3, skip_cases.rows(queries), ranks)
    assert skipped.any() or keys <= TILE
    assert saved.equal(skipped.flip(-1))


@pytest.mark.parametrize("way", ["one kernel", "two kernels"])
@pytest.mark.parametrize(
    ("dim", "value_dim", "causal"),
    [(64, 64, True), (128, 128, False), (128, 128, True), (256, 256, False), (192, 128, True)],
)
def test_gradients_are_those_of_what_is_kept(dim, value_dim, causal, way):
    """330 tokens: ragged groups and a ragged last tile of keys."""
    length, threshold = 330, 0.3
    given = skip_cases.inputs(length, heads=2, heads_kv=1, dim=dim, batch=1, value_dim=value_dim)
    ours = [x.to(BF16).requires_grad_() for x in given]
    only = contextlib.nullcontext() if way == "one kernel" else poisoned()  # deterministic
    with sparse_fmha.arch_override("sm90"), only:
        out, lse = sparse_fmha.attention(
            *ours, causal=causal, skip_threshold=threshold, return_lse=True
        )
        dout, dlse = skip_cases.cotangents(out.detach(), lse.detach())
        with poisoned():
            found = torch.autograd.grad((out, lse), ours, (dout, dlse))
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    ranks = reference.tile_ranks(length, TILE, descending=True)
    theirs = [x.detach().double().requires_grad_() for x in ours]
    q, k, v = theirs[0], *(x.repeat_interleave(2, 2) for x in theirs[1:])
    exact, exact_lse, skipped = reference.skip_attention(
        q, k, v, visible, threshold, skip_cases.rows(length), ranks
    )
    assert skipped.any()
    wanted = torch.autograd.grad(
        (exact, exact_lse), theirs, (dout.to(exact.dtype), dlse.to(exact_lse.dtype))
    )
    for gradient, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            gradient.double(), one, rtol=2e-2, atol=1e-2 * one.abs().max().item()
        )


def blocks(*sizes, heads=2, causal=False, kinds=(0.3, 0.5, 0.2)):
    """A mask and what it shows."""
    drawn = block_masks.Drawn(250, 400, *sizes, 1, heads, causal, kinds)
    return drawn.mask(), drawn.dense()


def stripes(block_q, range_size):
    """Columns among the first 200 keys, runs beyond them. The last groups have few, or none."""
    generator = torch.Generator().manual_seed(1)
    groups = -(-250 // block_q)
    columns = torch.stack([torch.randperm(200, generator=generator)[:170] for _ in range(groups)])
    counts = torch.tensor([170, 140, 60, 0])[:groups]
    starts = torch.tensor([[301, 200], [210, -1], [270, 350], [336, 205]])[:groups]
    # Runs are disjoint, where there are two.
    number = torch.tensor([1, 1, 1, 1] if range_size == 128 else [2, 1, 2, 1])[:groups]
    lists = (columns.sort(-1).values, counts, starts, number)
    columns, counts, starts, number = (x.int()[None, None] for x in lists)
    given = columns, counts, 250, 400, block_q
    runs = dict(range_starts=starts, range_counts=number, range_size=range_size, causal=True)
    return StripeMask(*given, **runs), reference.stripe_mask(*given, **runs)


LISTS = {
    "blocks 128x128": functools.partial(blocks, 128, 128),
    "blocks 128x64, causal": functools.partial(blocks, 128, 64, causal=True),
    "blocks 64x128, causal": functools.partial(blocks, 64, 128, causal=True),
    "blocks 64x32, one list": functools.partial(blocks, 64, 32, heads=1),
    "blocks 64x16, full": functools.partial(blocks, 64, 16, kinds=(0.5, 0.5, 0)),
    "stripes 128, runs of 64": functools.partial(stripes, 128, 64),
    "stripes 64, runs of 128": functools.partial(stripes, 64, 128),
}


@pytest.mark.parametrize(
    ("name", "dim", "way"),
    [
        *((name, dim, "two kernels") for name in LISTS for dim in (128, 256)),
        *((name, 128, "one kernel") for name in LISTS if "x128" in name),
    ],
)
def test_gradients_of_what_lists_keep(name, dim, way):
    mask, visible = LISTS[name]()
    by_stripes = name.startswith("stripes")
    call = sparse_fmha.stripe_attention if by_stripes else sparse_fmha.block_sparse_attention
    tiles_of_head = stripe_tiles if by_stripes else block_tiles
    given = skip_cases.inputs(250, 400, heads=2, heads_kv=1, dim=dim, batch=1)
    ours = [x.to(BF16).requires_grad_() for x in given]
    only = contextlib.nullcontext() if way == "one kernel" else poisoned()  # deterministic
    threshold = 0.9
    with sparse_fmha.arch_override("sm90"), only:
        out, lse, stats = call(
            *ours, mask, skip_threshold=threshold, return_lse=True, return_stats=True
        )
        dout, dlse = skip_cases.cotangents(out.detach(), lse.detach())
        with poisoned():
            found = torch.autograd.grad((out, lse), ours, (dout, dlse))
    tile_k = 128 if dim <= 128 else 32
    tiles = torch.stack([tiles_of_head(mask, 0, h, tile_k) for h in range(mask.counts.shape[1])])
    exact, exact_lse, skipped, wanted = skip_cases.expected(
        *ours, visible, skip_cases.rows(250), tiles, threshold, dout, dlse
    )
    assert stats.skipped.equal(skipped)
    assert skipped.any()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4)
    assert (out - exact).abs().max() <= 2 * torch.finfo(BF16).eps * exact.abs().max()
    # Errors of the gradient of q are those of rounding out.
    for gradient, one, error in zip(found, wanted, (2e-2, 1e-2, 5e-3), strict=True):
        assert (gradient - one).norm() <= error * one.norm()


WINDOWS = {
    "1-D": ((400,), (150,), {}),
    "1-D, tokens in order": ((384,), (150,), {}),
    "1-D, extra tokens": ((300,), (150,), {"extra": 133}),
    "2-D, causal": ((13, 24), (9, 11), {"stride": (2, 3), "causal": (True, False)}),
    "2-D, dilated": ((24, 30), (8, 9), {"dilation": (2, 3), "causal": (True, False)}),
    "1-D, interleaved grids": ((600,), (100,), {"dilation": 4}),
    "3-D": ((5, 7, 12), (3, 5, 7), {}),
}


@pytest.mark.parametrize(
    ("name", "dim", "way"),
    [
        *((name, 128, way) for name in WINDOWS for way in ("one kernel", "two kernels")),
        ("2-D, causal", 256, "two kernels"),
    ],
)
def test_gradients_of_what_windows_keep(name, dim, way):
    """Two batch entries, which have tensor maps of their own with three axes."""
    grid, window, options = WINDOWS[name]
    options, length, threshold = dict(options), torch.Size(grid).numel(), 0.9
    extra = options.pop("extra", 0)
    q, k, v = skip_cases.inputs(length, length + extra, heads=2, heads_kv=1, dim=dim)
    ours = [x.to(BF16).requires_grad_() for x in (q, k, v)]
    q, k, v = ours[0], *(x[:, :length] for x in ours[1:])
    more = {f"extra_{n}": x[:, length:] for n, x in zip("kv", ours[1:], strict=True)}
    only = contextlib.nullcontext() if way == "one kernel" else poisoned()  # deterministic
    with sparse_fmha.arch_override("sm90"), only:
        out, lse, stats = sparse_fmha.neighborhood_attention(
            *(x.unflatten(1, grid) for x in (q, k, v)), window, **options,
            skip_threshold=threshold, return_lse=True, return_stats=True,
            **(more if extra else {}),
        )  # fmt: skip
        dout, dlse = skip_cases.cotangents(out.detach(), lse.detach())
        found = torch.autograd.grad((out, lse), ours, (dout, dlse))
    groups, tiles = neighborhood_tiles(grid, window, extra, head_dim=dim, **options)
    visible = reference.neighborhood_mask(grid, window, extra=extra, **options)
    _, exact_lse, skipped, wanted = skip_cases.expected(
        *ours, visible, groups, tiles, threshold, dout, dlse
    )
    assert stats.skipped.equal(skipped)
    assert skipped.any()
    torch.testing.assert_close(lse.flatten(1, -2).double(), exact_lse, rtol=2e-6, atol=1e-4)
    for gradient, one, error in zip(found, wanted, (2e-2, 1e-2, 5e-3), strict=True):
        assert (gradient - one).norm() <= error * one.norm()


@pytest.mark.parametrize("name", WINDOWS)
def test_what_windows_skip_is_saved(name):
    """In the shape that fake tensors have."""
    grid, window, options = WINDOWS[name]
    options, length, axes = dict(options), torch.Size(grid).numel(), len(grid)
    extra = options.pop("extra", 0)
    q, k, v = (
        x.to(BF16) for x in skip_cases.inputs(length, length + extra, heads=2, heads_kv=1, dim=128)
    )
    k, v, more = k[:, :length], v[:, :length], (k[:, length:], v[:, length:])

    def each(name, otherwise):
        value = options.get(name, otherwise)
        return [int(x) for x in (value if isinstance(value, tuple) else (value,) * axes)]

    threshold = torch.full((2,), 0.9)
    given = [
        *(x.unflatten(1, grid) for x in (q, k, v)),
        list(window), each("stride", 1), each("dilation", 1), each("causal", False),
        None, *(more if extra else (None, None)), threshold,
    ]  # fmt: skip
    with sparse_fmha.arch_override("sm90"), poisoned():
        plain = OPS.neighborhood_fwd(*given)
        *same, bits = OPS.neighborhood_fwd(*given, save_skipped=True)
        fakes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in given]
        fake = OPS.neighborhood_fwd(*fakes, save_skipped=True)[3]
    assert all(a.equal(b) for a, b in zip(plain, same, strict=True))
    assert (bits.shape, bits.dtype) == (fake.shape, fake.dtype)
    marked = (bits[..., None] >> torch.arange(32) & 1).sum((2, 3, 4))
    assert plain[2][..., 1].sum() > 0
    assert (marked >= plain[2][..., 1]).all()  # a tile of which no row sees a key is marked, too
