"""The oracle itself: against PyTorch in fp64, and against masks and sums written out by hand."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_fmha import reference


def rows(text):
    """A mask from a drawing: one line per query, '#' where it sees the key."""
    return torch.tensor([[c == "#" for c in line] for line in text.split()])


def heads_last(f, *tensors, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return f(*(t.transpose(1, 2) for t in tensors), **options).transpose(1, 2)


SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("scale", [None, 0.3, -1.5, 0.0])
@pytest.mark.parametrize("heads_kv", [1, 2, 6])
def test_equals_torch_under_any_mask(randn, heads_kv, scale):
    q = randn(2, 19, 6, 16, dtype=torch.float64)
    k, v = (randn(2, 23, heads_kv, 16, dtype=torch.float64, seed=s) for s in (1, 2))
    visible = randn(2, 6, 19, 23, seed=3) > 0.5
    visible[..., 4] = True
    out, lse = reference.attention(q, k, v, visible, scale)
    expected = heads_last(SDPA, q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    keys = k.repeat_interleave(6 // heads_kv, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * (0.25 if scale is None else scale)
    sums = scores.exp().mul(visible).sum(-1).log().transpose(1, 2)
    torch.testing.assert_close(lse, sums, rtol=1e-13, atol=1e-13)


def test_chunks_do_not_show(randn, monkeypatch):
    q, k, v = (randn(2, 4, 5, 4, 8, seed=s) for s in range(3))
    visible = reference.neighborhood_mask((4, 5), 3)
    whole = reference.attention(q, k, v, visible)
    monkeypatch.setattr(reference, "_CHUNK", 4 * 20 * 3)  # three rows at a time
    for a, b in zip(whole, reference.attention(q, k, v, visible), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_row_without_keys(randn):
    q, k, v = (randn(1, 3, 2, 8, dtype=torch.float64, seed=s).requires_grad_() for s in range(3))
    visible = rows("#.# ... .#.")
    out, lse = reference.attention(q, k, v, visible)
    assert out[0, 1].eq(0).all()
    assert lse[0, 1].eq(-math.inf).all()
    torch.testing.assert_close(out[0, 2], v[0, 1])  # one key: its value
    torch.testing.assert_close(lse[0, 2], (q[0, 2] * k[0, 1]).sum(-1) * 8**-0.5)
    out.sum().backward()
    assert q.grad[0, 1].eq(0).all()
    assert all(t.grad.isfinite().all() and t.grad.abs().sum() > 0 for t in (q, k, v))


def test_no_keys_at_all(randn):
    out, lse = reference.attention(
        randn(2, 3, 2, 8), randn(2, 0, 2, 8), randn(2, 0, 2, 8), torch.tensor(True)
    )
    assert out.shape == (2, 3, 2, 8)
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()


def test_large_scores_do_not_overflow(randn):
    q, k, v = (randn(1, 9, 1, 8, dtype=torch.float64, seed=s) for s in range(3))
    out, lse = reference.attention(q, k, v, torch.tensor(True), scale=1e4)
    best = torch.einsum("bihd,bjhd->bij", q, k).argmax(-1)[0]
    torch.testing.assert_close(out[0], v[0, best])
    torch.testing.assert_close(lse[0, :, 0], 1e4 * (q[0, :, 0] * k[0, best, 0]).sum(-1))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"visible": torch.ones(4, 4)},
            TypeError,
            "visible must have dtype torch.bool, got torch.float32",
        ),
        (
            {"visible": torch.ones(5, 4, dtype=torch.bool)},
            ValueError,
            r"visible must broadcast to \[B, Hq, Lq, Lk\] = \[1, 2, 4, 4\], got shape",
        ),
        (
            {"k": torch.ones(1, 4, 3, 8)},
            ValueError,
            "q and k must have one B and D, and v the shape of k but for the last size, got shapes",
        ),
        (
            {"q": torch.ones(1, 4, 3, 8)},
            ValueError,
            r"heads of q must be a multiple of those of k, got shapes \(1, 4, 3, 8\),",
        ),
        (
            {"k": torch.ones(1, 4, 0, 8), "v": torch.ones(1, 4, 0, 8)},
            ValueError,
            r"heads of q must be a multiple of those of k, got shapes \(1, 4, 2, 8\), \(1, 4, 0, 8",
        ),
        ({"q": torch.ones(4, 2, 8)}, ValueError, r"\[B, \*L, H, D\]"),
    ],
)
def test_errors_of_attention(change, error, text):
    given = dict.fromkeys("qkv", torch.ones(1, 4, 2, 8)) | {"visible": torch.tensor(True)}
    with pytest.raises(error, match=text):
        reference.attention(**(given | change))


def test_no_heads():
    q, visible = torch.ones(1, 4, 0, 8), torch.tensor(True)
    out, lse = reference.attention(q, q, q, visible)
    assert (out.shape, lse.shape) == ((1, 4, 0, 8), (1, 4, 0))
    out, lse, skipped = reference.skip_attention(q, q, q, visible, 0.5)
    assert (out.shape, lse.shape, skipped.shape) == ((1, 4, 0, 8), (1, 4, 0), (1, 0, 1, 1))


def test_causal_mask_ends_at_the_last_key():
    assert reference.causal_mask(2, 4).equal(rows("###. ####"))
    assert reference.causal_mask(4, 2).equal(rows(".. .. #. ##"))
    assert reference.causal_mask(3, 3).equal(rows("#.. ##. ###"))


WINDOWS = {  # 1-D: (length, window, stride, dilation, causal) -> drawing
    (4, 1, 1, 1, False): "#... .#.. ..#. ...#",
    (4, 1, 1, 3, True): "#... .#.. ..#. ...#",
    (7, 3, 1, 1, False): "###.... ###.... .###... ..###.. ...###. ....### ....###",
    (7, 4, 1, 1, False): "####... ####... ####... .####.. ..####. ...#### ...####",
    # Groups {0 1} {2 3} {4 5} {6} around their leaders 1, 3, 5, 6 (7 is beyond the end).
    (7, 3, 2, 1, False): "###.... ###.... ..###.. ..###.. ....### ....### ....###",
    # Stride equal to the window: blocks {0 1 2} {3 4 5} {6}, the last one's window shifted.
    (7, 3, 3, 1, False): "###.... ###.... ###.... ...###. ...###. ...###. ....###",
    # Dilation 2: even keys 0 2 4 6 and odd keys 1 3 5, each with a window of 3.
    (7, 3, 1, 2, False): "#.#.#.. .#.#.#. #.#.#.. .#.#.#. ..#.#.# .#.#.#. ..#.#.#",
    (7, 3, 1, 1, True): "#...... ##..... ###.... .###... ..###.. ...###. ....###",
    # Leaders 1, 3, 5, 6: windows end there, and no query sees what is behind itself.
    (7, 3, 2, 1, True): "#...... ##..... .##.... .###... ...##.. ...###. ....###",
    (7, 3, 1, 2, True): "#...... .#..... #.#.... .#.#... #.#.#.. .#.#.#. ..#.#.#",
}


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows_drawn_by_hand(case):
    length, window, stride, dilation, causal = case
    mask = reference.neighborhood_mask(length, window, stride, dilation, causal)
    assert mask.equal(rows(WINDOWS[case]))


def test_grid_is_the_product_of_its_axes():
    mask = reference.neighborhood_mask((3, 4, 5), (2, 3, 2), (1, 2, 1), (1, 1, 2), (0, 1, 0))
    axes = [
        reference.neighborhood_mask(*axis)
        for axis in ((3, 2, 1, 1, 0), (4, 3, 2, 1, 1), (5, 2, 1, 2, 0))
    ]
    mask = mask.reshape(3, 4, 5, 3, 4, 5)
    for t, y, x in ((0, 0, 0), (1, 2, 3), (2, 3, 4), (2, 0, 1)):
        expected = torch.einsum("t,y,x->tyx", axes[0][t].int(), axes[1][y].int(), axes[2][x].int())
        assert mask[t, y, x].equal(expected.bool())


def test_extra_keys_come_last_and_are_always_seen():
    mask = reference.neighborhood_mask((3, 4), 2, extra=3)
    assert mask.shape == (12, 15)
    assert mask[:, :12].equal(reference.neighborhood_mask((3, 4), 2))
    assert mask[:, 12:].all()


@pytest.mark.parametrize(
    "bad",
    [
        {"window": 0},
        {"window": 8},
        {"stride": 4},
        {"stride": 0},
        {"dilation": 3},
        {"dilation": 0},
        {"window": (3, 3)},
    ],
)
def test_errors_of_neighborhood_mask(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        reference.neighborhood_mask(7, **({"window": 3} | bad))


def test_block_lists_drawn_by_hand():
    counts, indices = torch.tensor([[[1, 0]]]), torch.tensor([[[[1, 0], [7, 7]]]])
    partial_counts, partial_indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[0, 9], [2, 0]]]])
    pairs = torch.zeros(1, 1, 2, 2, 2, 3, dtype=torch.bool)
    pairs[0, 0, 0, 0] = rows("#.. .#.")
    pairs[0, 0, 1, 0] = rows("#.# ###")  # ragged: only keys 6 and 7 exist, and only query 2
    pairs[0, 0, 1, 1] = rows("..# ###")
    args = (counts, indices, 3, 8, 2, 3, partial_counts, partial_indices, pairs)
    assert reference.block_sparse_mask(*args)[0, 0].equal(rows("#..###.. .#.###.. ..#...#."))
    causal = reference.block_sparse_mask(*args, causal=True)  # query i sees keys up to i + 5
    assert causal[0, 0].equal(rows("#..###.. .#.###.. ..#...#."))
    counts[0, 0, 0] = 0
    args = (counts, indices, 3, 3, 2, 3, partial_counts.clamp(max=1), 0 * partial_indices, pairs)
    assert reference.block_sparse_mask(*args, causal=True)[0, 0].equal(rows("#.. .#. #.#"))
    with pytest.raises(
        ValueError, match=r"indices of \(batch, head, query block\) \(0, 0, 0\) must list each of 0"
    ):
        reference.block_sparse_mask(torch.tensor([[[2]]]), torch.tensor([[[[1, 1]]]]), 2, 8, 2, 3)
    with pytest.raises(ValueError, match="each of 0 to 2"):
        reference.block_sparse_mask(torch.tensor([[[1]]]), torch.tensor([[[[3]]]]), 2, 8, 2, 3)


def test_stripes_drawn_by_hand():
    columns, counts = torch.tensor([[[[0, 3, 6], [1, 0, 0]]]]), torch.tensor([[[3, 1]]])
    ranges = {
        "range_starts": torch.tensor([[[[1, 4], [6, 0]]]]),
        "range_counts": torch.tensor([[[2, 1]]]),
        "range_size": 2,
    }
    assert reference.stripe_mask(columns, counts, 3, 7, 2)[0, 0].equal(
        rows("#..#..# #..#..# .#.....")
    )
    assert reference.stripe_mask(columns, counts, 3, 7, 2, **ranges)[0, 0].equal(
        rows("####### ####### .#....#")
    )
    causal = reference.stripe_mask(columns, counts, 3, 7, 2, causal=True)  # up to key i + 4
    assert causal[0, 0].equal(rows("#..#... #..#... .#....."))
    with pytest.raises(
        ValueError, match=r"columns and ranges of \(batch, head, query block\) \(0, 0, 0\) must"
    ):
        reference.stripe_mask(columns, counts, 3, 7, 2, **(ranges | {"range_size": 3}))


def one_feature(*scores):
    """q and k of one head and eight features whose scaled scores are these, for every query."""
    k = torch.zeros(1, len(scores), 1, 8, dtype=torch.float64)
    k[0, :, 0, 0] = torch.tensor(scores, dtype=torch.float64)
    q = torch.zeros(1, 3, 1, 8, dtype=torch.float64)
    q[..., 0] = 1
    return q, k


def test_skipped_tile_by_hand(randn):
    """Tiles of two keys with the maxima 1, -2, 4, 2: lambda e^-2.5 lets go of those 2.5 below."""
    q, k = one_feature(1, 0, -2, -3, 4, 0, 2, 1)
    v = randn(1, 8, 1, 8, dtype=torch.float64)
    every = torch.tensor(True)
    threshold = math.exp(-2.5)

    out, lse, skipped = reference.skip_attention(q, k, v, every, threshold, 3, 2, scale=1)
    assert skipped[0, 0].tolist() == [[False, True, False, False]]  # -2 - 1 < -2.5; 2 - 4 is not
    kept = [0, 1, 4, 5, 6, 7]
    weights = k[0, kept, 0, 0].exp()
    torch.testing.assert_close(out[0, 1, 0], weights @ v[0, kept, 0] / weights.sum())
    torch.testing.assert_close(lse[0, 1, 0], weights.sum().log())

    # From the last tile: maxima 2, 4, -2, 1; now 1 - 4 is skipped too.
    order = reference.tile_ranks(8, 2, descending=True)
    _, _, skipped = reference.skip_attention(q, k, v, every, threshold, 3, order, scale=1)
    assert skipped[0, 0].tolist() == [[False, False, True, True]]

    # A negative third query finds tile 1 its best, so the group as a whole visits it; a group of
    # its own leaves the other two free to skip. Its own maxima are 0, 3, 0, -1.
    q[0, 2] *= -1
    _, _, skipped = reference.skip_attention(q, k, v, every, threshold, 3, 2, scale=1)
    assert skipped[0, 0].tolist() == [[False, False, False, False]]
    _, _, skipped = reference.skip_attention(q, k, v, every, threshold, 2, 2, scale=1)
    assert skipped[0, 0].tolist() == [[False, True, False, False], [False, False, True, True]]

    # The third query sees nothing of tile 1: it votes skip, and for tile 1 the group skips again.
    visible = torch.ones(3, 8, dtype=torch.bool)
    visible[2, 2:4] = False
    _, _, skipped = reference.skip_attention(q, k, v, visible, threshold, 3, 2, scale=1)
    assert skipped[0, 0].tolist() == [[False, True, False, False]]


def test_skip_nothing_is_dense(randn):
    q, k, v = (randn(2, 70, h, 8, seed=s) for s, h in enumerate((4, 2, 2)))
    visible = reference.causal_mask(70, 70)
    out, lse, skipped = reference.skip_attention(q, k, v, visible, 0.0, 64, 16)
    exact, exact_lse = reference.attention(q, k, v, visible)
    assert out.equal(exact)
    assert lse.equal(exact_lse)
    assert skipped.shape == (2, 4, 2, 5)
    assert not skipped.any()


def test_skip_against_the_loop(randn):
    """The published recurrence, one tile after the other, with a threshold for each batch entry."""
    q, k, v = (4 * randn(2, 40, h, 8, dtype=torch.float64, seed=s) for s, h in enumerate((4, 2, 2)))
    visible, size, scale = reference.causal_mask(40, 40), 8, 8**-0.5
    threshold = torch.tensor([0.5, 0.01], dtype=torch.float64)
    out, _, skipped = reference.skip_attention(q, k, v, visible, threshold, 4, size)
    assert skipped[0].sum() > skipped[1].sum() > 0
    for b, h, g in ((0, 0, 3), (0, 3, 7), (1, 1, 9), (1, 2, 6)):
        part = slice(g * 4, g * 4 + 4)
        best = torch.full((len(q[b, part]), 1), -math.inf, dtype=torch.float64)
        total, acc = 0, 0
        for t in range(40 // size):
            keys = slice(t * size, t * size + size)
            s = scale * q[b, part, h] @ k[b, keys, h // 2].T
            s = s.masked_fill(~visible[part, keys], -math.inf)
            if (s == -math.inf).all():
                continue
            top = s.amax(-1, keepdim=True)
            seen = top > -math.inf
            skip = bool((top - best < threshold[b].log())[seen].all())
            assert skip == bool(skipped[b, h, g, t])
            if skip:
                continue
            new = torch.maximum(best, top)
            safe = new.masked_fill(new == -math.inf, 0)
            p, decay = (s - safe).exp(), (best - safe).exp()
            total, acc = (
                total * decay + p.sum(-1, keepdim=True),
                acc * decay + p @ v[b, keys, h // 2],
            )
            best = new
        torch.testing.assert_close(out[b, part, h], acc / total)


@pytest.mark.parametrize("threshold", [1.0, -0.1, math.nan])
def test_errors_of_skip_threshold(randn, threshold):
    q = randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="skip_threshold"):
        reference.skip_attention(q, q, q, torch.tensor(True), threshold)
