"""Radial attention, Sparse VideoGen and sliding tiles against loops over frames and tokens."""

import itertools
import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import neighborhood_attention, patterns, reference


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def radial(frames, size, text, decay, first_frame, block):
    """Bool [nQ, nK], from masks of tokens for each pair of frames."""
    length = frames * size + text
    count = -(-length // block)
    blocks = torch.zeros(count, count, dtype=torch.bool)
    x = torch.arange(size)
    for i, j in itertools.product(range(frames), repeat=2):
        d = abs(i - j)
        halved = 2 ** size.bit_length() / 2 ** d.bit_length()
        wide = size if d <= 1 else max(halved * decay, block)
        seen = (x[:, None] - x).abs() <= wide
        if halved < block and d % int(block / halved):
            seen = torch.zeros_like(seen)
        if first_frame and j == 0:
            seen = torch.ones_like(seen)
        first = [n * size // block for n in (i, j)]  # blocks of the frames
        some = -(-size // block) + 1
        tokens = torch.zeros(some * block, some * block, dtype=torch.bool)
        at = [n * size - f * block for n, f in zip((i, j), first, strict=True)]
        tokens[at[0] : at[0] + size, at[1] : at[1] + size] = seen
        queries = tokens.view(some, block, some, block).sum(1)  # of each key
        there, many = (queries > 0).sum(-1), (queries > block / 3).sum(-1)
        listed = (many > 0.6 * there)[: count - first[0], : count - first[1]]
        blocks[first[0] :, first[1] :][:some, :some] |= listed
    if text:
        blocks[frames * size // block :] = True
        blocks[:, frames * size // block :] = True
    return blocks


@pytest.mark.parametrize(
    ("frames", "size", "text", "decay", "first_frame", "block"),
    [
        (9, 200, 0, 1.0, False, 64),
        (9, 200, 100, 0.2, True, 64),
        (12, 128, 0, 1.0, False, 128),  # frames of one block: some are not seen at all
        (6, 333, 20, 0.5, False, 128),
        (5, 30, 0, 1.0, True, 64),  # several frames in a block
    ],
)
def test_radial(frames, size, text, decay, first_frame, block):
    mask = patterns.radial(
        frames, size, text=text, decay=decay, first_frame=first_frame, block=block
    )
    mask.validate()
    expected = radial(frames, size, text, decay, first_frame, block)
    assert torch.equal(mask.blocks()[0, 0], expected)
    assert not expected.all() or size == 30


def test_radial_gets_sparser_with_distance():
    mask = patterns.radial(32, 512, block=64)
    density = [mask.blocks()[0, 0, :8, n * 8 : (n + 1) * 8].float().mean() for n in range(32)]
    assert density[0] == density[1] == 1
    assert all(a >= b for a, b in itertools.pairwise(density[1:16]))
    assert density[16:].count(0) == 8  # every second frame


def bands(frames, size, text, keep, block, first_frame=False):
    """Bool [L, L] of tokens in the order of the head, by the formula of the width."""
    length = frames * size + text
    width = length * (1 - math.sqrt(1 - keep + 2 * text / length))
    i = torch.arange(length) // block
    seen = (i[:, None] - i).abs() < int(width) // block
    if text:
        of_text = i >= frames * size // block
        seen |= of_text | of_text[:, None]
    if first_frame:
        seen |= i <= (size - 1) // block
    return seen


def by_places(frames, size, text):
    """Where each token of the usual order stands in the order of places, by loops."""
    order = [f * size + p for p in range(size) for f in range(frames)]
    order += range(frames * size, frames * size + text)
    place = torch.empty(len(order), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(order))
    return place


VIDEOS = [(7, 100, 0, 0.3, 64), (6, 90, 50, 0.5, 64), (5, 200, 30, 0.6, 128)]
videos = pytest.mark.parametrize(("frames", "size", "text", "keep", "block"), VIDEOS)


@videos
@pytest.mark.parametrize("first_frame", [False, True])
def test_svg_mask(frames, size, text, keep, block, first_frame):
    mask = patterns.svg_mask(
        frames, size, text=text, keep=keep, block=block, first_frame=first_frame
    )
    mask.validate()
    expected = bands(frames, size, text, keep, block, first_frame)
    assert torch.equal(mask.to_dense()[0, 0], expected)
    assert not expected.all()


def video(frames, size, text, temporal, seed=0):
    """Queries and keys whose heads look at their own frame, or at their place in all frames."""
    length = frames * size + text
    q, k, v = (normal(2, length, h, 16, seed=seed + n) for n, h in enumerate((4, 2, 2)))
    token = torch.arange(length)
    of_frame = normal(frames + text + 1, 16, seed=5)[token // size]
    of_place = normal(size, 16, seed=6)[token % size]
    for h in range(2):
        own = of_place if temporal[h] else of_frame
        k[:, :, h] += 2 * own
        q[:, :, 2 * h : 2 * h + 2] += 2 * own[:, None]
    return q, k, v


@videos
@pytest.mark.parametrize("temporal", [[False, True], [True, False]])
def test_svg(frames, size, text, keep, block, temporal):
    q, k, v = video(frames, size, text, temporal)
    mask = patterns.svg_mask(frames, size, text=text, keep=keep, block=block)
    with Watch():
        chosen = patterns.svg_heads(q, k, v, mask, frames, size, rows=48)
        out = patterns.svg_attention(q, k, v, mask, frames, size)
    assert chosen.tolist() == [temporal] * 2
    place = by_places(frames, size, text)
    band = mask.to_dense()[0, 0]
    visible = torch.stack([band[place][:, place] if t else band for t in temporal])
    visible = visible.repeat_interleave(2, 0)
    expected, _ = reference.attention(q, k, v, visible)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_svg_compares_outputs_of_the_sampled_queries():
    """The choice is that of errors computed with dense masks."""
    frames, size, text = 4, 70, 10
    q, k, v = (normal(2, 290, h, 16, seed=n) for n, h in enumerate((4, 2, 2)))
    mask = patterns.svg_mask(frames, size, text=text, keep=0.5, block=64)
    chosen = patterns.svg_heads(q, k, v, mask, frames, size, rows=5)
    place, band = by_places(frames, size, text), mask.to_dense()[0, 0]
    rows = [28, 84, 140, 196, 252]
    full = torch.ones_like(band)
    dense, spatial, moved = (
        reference.attention(q, k, v, m)[0][:, rows] for m in (full, band, band[place][:, place])
    )
    errors = [(x - dense).square().sum((1, 3)).view(2, 2, 2).sum(-1) for x in (spatial, moved)]
    assert torch.equal(chosen, errors[1] < errors[0])


def test_svg_trains():
    frames, size = 4, 50
    leaves = [x.double().requires_grad_() for x in video(frames, size, 0, [True, False])]
    mask = patterns.svg_mask(frames, size, keep=0.7, block=64)
    temporal = torch.tensor([[True, False]])
    weight = normal(2, 200, 4, 16, seed=9)
    out = patterns.svg_attention(*leaves, mask, frames, size, temporal)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    place, band = by_places(frames, size, 0), mask.to_dense()[0, 0]
    visible = torch.stack([band[place][:, place], band]).repeat_interleave(2, 0)
    theirs = torch.autograd.grad((reference.attention(*leaves, visible)[0] * weight).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [
        ((4, 6, 9), (2, 2, 3), (1, 3, 1)),
        ((12, 15), (4, 5), (3, 1)),
        ((20,), (2,), (5,)),
        ((8, 6), (2, 3), (4, 1)),
    ],
)
def test_sliding_tile(grid, tile, window):
    sizes, stride = patterns.sliding_tile(grid, tile, window)
    tokens = list(itertools.product(*map(range, grid)))

    def sees(x, y, length, size, tiles):
        first = min(max(x // size - tiles // 2, 0), length // size - tiles)
        return first <= y // size < first + tiles

    expected = torch.tensor(
        [[all(map(sees, a, b, grid, tile, window)) for b in tokens] for a in tokens]
    )
    assert torch.equal(reference.neighborhood_mask(grid, sizes, stride), expected)
    q = normal(1, *grid, 2, 16)
    out = neighborhood_attention(q, q, q, sizes, stride=stride)
    found, _ = reference.attention(q, q, q, expected)
    torch.testing.assert_close(out.double(), found, atol=1e-5, rtol=1e-5)


Q = normal(1, 290, 2, 16)
MASK = patterns.svg_mask(4, 70, text=10, keep=0.5, block=64)
R, S, T = patterns.radial, patterns.svg_mask, patterns.sliding_tile


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: R(0, 9), ValueError, "frames must be at least 1, got 0"),
        (lambda: R(9, 9, decay=0), ValueError, "decay must be above 0, got 0"),
        (lambda: R(9, 9, block=32), ValueError, "block_q must be 64 or 128, got 32"),
        (lambda: R(9, 9, first_frame=1), TypeError, "first_frame must be True or False, got 1"),
        (
            lambda: S(4, 70, text=10, keep=0.05),
            ValueError,
            "keep must leave a band of at least a block of 128 tokens beside 10 of",
        ),
        (lambda: S(4, 70, keep=1.5), ValueError, r"keep must be from 0 to 1, got 1\.5"),
        (
            lambda: patterns.svg_heads(Q, Q, Q, MASK, 5, 70),
            ValueError,
            r"frames \* frame_tokens must be at most the 290 tokens of q, got 5 \* 70",
        ),
        (
            lambda: patterns.svg_heads(Q[:, 1:], Q, Q, MASK, 4, 70),
            ValueError,
            "mask must be for the 289 tokens of q, got one for 290",
        ),
        (
            lambda: patterns.svg_attention(Q, Q, Q, MASK, 4, 70, torch.ones(1, 3) > 0),
            ValueError,
            r"temporal must have shape \[1 or 1, 2\], got \[1, 3\]",
        ),
        (
            lambda: patterns.svg_attention(Q, Q, Q, MASK, 4, 70, torch.ones(1, 2)),
            TypeError,
            r"temporal must be a bool tensor, got torch\.float32",
        ),
        (lambda: T((8, 8), (4,), (1, 1)), ValueError, "as many in each"),
        (
            lambda: T((8, 9), (4, 4), (1, 1)),
            ValueError,
            r"tile\[1\] must divide grid\[1\] = 9, got 4",
        ),
        (
            lambda: T((16,), (4,), (2,)),
            ValueError,
            r"window\[0\] must be odd or all 4 tiles, got 2",
        ),
        (
            lambda: T((16,), (4,), (5,)),
            ValueError,
            r"window\[0\] must be at most the 4 tiles of that axis, got 5",
        ),
        (lambda: T((16,), (4.0,), (5,)), TypeError, r"tile\[0\] must be an int, got 4\.0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
