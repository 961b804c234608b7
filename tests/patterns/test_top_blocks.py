"""The choice of blocks by scores, against plain loops: a number of them, a share, a mass."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_fmha.masks import block_lists
from sparse_fmha.selection import (
    BlockGrid,
    block_scores,
    choosing,
    largest,
    shares,
    top_k_blocks,
    top_k_indices,
    top_p_blocks,
)

NAN, INF = float("nan"), float("inf")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tied(draw, rows, columns, values):
    return [[draw(st.sampled_from(values)) for _ in range(columns)] for _ in range(rows)]


@st.composite
def tied_scores(draw):
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    return tied(draw, rows, columns, [-INF, NAN, INF, -1.5, -0.0, 0.0, 0.5, 2.0])


def drawn_scores(n, kind, dtype):
    """Rows with ties in several places of the order, and values that are never taken."""
    x = normal(5, n, seed=n)
    if kind == "few values":
        x = x.round()
    elif kind == "one value":
        x = torch.zeros_like(x) * x.sign()  # of both signs
    elif kind == "not numbers":
        x[x > 0.5], x[x < -0.5] = NAN, -INF
    elif kind == "infinite":
        x = x.round()
        x[x > 1], x[:, ::7] = INF, -INF
    return x.to(dtype)


KINDS = ["normal", "few values", "one value", "not numbers", "infinite"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(4, 4000),
    st.integers(4, 2000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 1 << 18]),
)
def test_lists_of_the_largest_are_those_of_the_map(kind, n, share, dtype, most):
    scores, k = drawn_scores(n, kind, dtype), max(1, n // share)
    assert largest.applies(scores, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "CACHED", most)
        made = top_k_indices(scores, k)
        patch.setattr(largest, "applies", lambda *_: False)
        expected = top_k_indices(scores, k)
    for own, other in zip(made, expected, strict=True):
        assert own.dtype == other.dtype
        assert own.equal(other)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 310),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_few_kernels_choose_and_list_what_others_do(kind, n, k, dtype):
    """On a GPU small tables are sorted, as launches would take longer."""
    scores = drawn_scores(n, kind, dtype)
    expected = top_k_blocks(scores, k)
    lists = block_lists.list_blocks(expected, max(1, n // 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_lists, "is_launches", lambda _: True)
        assert top_k_blocks(scores, k).equal(expected)
        made = block_lists.list_blocks(expected, max(1, n // 2))
    for own, other in zip(made, lists, strict=True):
        assert own.dtype == other.dtype
        assert own.equal(other)


@pytest.mark.parametrize("kind", [*KINDS, "large and tiny"])
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3000),
    st.floats(0, 40),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([100, 1 << 18]),
)
def test_shares_without_a_sort_are_those_of_the_sort(kind, n, p, each, dtype, most):
    x = drawn_scores(n, kind, torch.float32)
    x = x * 10.0 ** (20 * normal(5, n, seed=1)) if kind == "large and tiny" else x / 8
    p = torch.tensor([[p / 8], [p], [1.0], [1e-9], [p / 2]]) if each else p
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "CACHED", most)
        patch.setattr(choosing, "LONG", 1 << 30)
        expected = top_p_blocks(x.to(dtype), p)
        patch.setattr(choosing, "LONG", 1)
        assert top_p_blocks(x.to(dtype), p).equal(expected)


@settings(max_examples=150)
@given(
    tied_scores(),
    st.integers(0, 10),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([1, 1 << 24]),
)
def test_top_k(scores, k, dtype, most):
    """Ties: the lowest index first; -inf and NaN never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "SLICE", most)
        blocks = top_k_blocks(torch.tensor(scores, dtype=dtype), k)
        counts, indices = top_k_indices(torch.tensor(scores, dtype=dtype), k)
    assert indices.shape == (len(scores), min(k, len(scores[0])))
    assert counts.dtype == indices.dtype == torch.int32
    for row, chosen, count, listed in zip(scores, blocks, counts, indices, strict=True):
        there = [n for n, score in enumerate(row) if score > -INF]
        expected = sorted(sorted(there, key=lambda n: (-row[n], n))[:k])
        assert chosen.nonzero()[:, 0].tolist() == expected
        assert listed[:count].tolist() == expected
        assert (listed[count:] == -1).all()


def the_largest(row, k):
    """Which of a row are its k largest, the lowest index first of equal ones."""
    there = [n for n, score in enumerate(row) if score > -INF]
    return sorted(sorted(there, key=lambda n: (-row[n], n))[: max(k, 0)])


@settings(max_examples=100)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 1 << 24]))
def test_top_k_of_each_head(data, heads, columns, most):
    values = [-INF, NAN, INF, -1.5, 0.0, 0.5, 2.0]
    rows = tied(data.draw, 2 * heads * 2, columns, values)
    scores = torch.tensor(rows).view(2, heads, 2, columns)
    ks = [data.draw(st.integers(0, columns + 1)) for _ in range(heads)]
    by_row = torch.tensor([data.draw(st.integers(-1, columns + 1)) for _ in rows])
    by_row = by_row.view(2, heads, 2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "SLICE", most)
        for k in (ks, tuple(ks), torch.tensor(ks), torch.tensor(ks).view(heads, 1, 1), by_row):
            blocks = top_k_blocks(scores, k)
            counts, indices = top_k_indices(scores, k)
            width = min(max(ks), columns) if isinstance(k, list | tuple) else columns
            assert indices.shape == (2, heads, 2, width)
            for place, chosen in enumerate(blocks.flatten(0, 2)):
                own = ks[place // 2 % heads] if k is not by_row else by_row.flatten()[place]
                expected = the_largest(rows[place], own)
                assert chosen.nonzero()[:, 0].tolist() == expected
                count = counts.flatten()[place]
                assert indices.flatten(0, 2)[place, :count].tolist() == expected


@settings(max_examples=100)
@given(tied_scores(), st.fractions(0, 1, max_denominator=30))
def test_top_share(scores, density):
    """Of what a row has above -inf, rounded up."""
    blocks = top_k_blocks(torch.tensor(scores), density=float(density))
    counts, indices = top_k_indices(torch.tensor(scores), density=float(density))
    assert indices.shape[-1] == math.ceil(len(scores[0]) * density)
    for row, chosen, count, listed in zip(scores, blocks, counts, indices, strict=True):
        k = math.ceil(sum(score > -INF for score in row) * density)
        assert chosen.nonzero()[:, 0].tolist() == listed[:count].tolist() == the_largest(row, k)


def test_a_share_of_causal_scores_is_one_of_what_causality_leaves():
    q = normal(1, 64 * 100, 1, 8)
    grid = BlockGrid.of(q, q, 64, 64, causal=True)
    mask = grid.mask(top_k_blocks(block_scores(q, q, grid), density=0.2))
    assert 0.2 <= mask.reachable_block_density < 0.21
    assert 0.1 < mask.block_density < 0.11


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "exactly one of k and density must be given, got neither"),
        (
            {"k": 1, "density": 0.5},
            ValueError,
            "exactly one of k and density must be given, got both",
        ),
        ({"density": 1.5}, ValueError, "density must be from 0 to 1, got 1.5"),
        ({"density": "1"}, TypeError, "density must be a number, got '1'"),
        (
            {"k": [1, 2, 3]},
            ValueError,
            r"k must have one entry for each head of scores \[..., heads, query",
        ),
        ({"k": [1, -2]}, ValueError, r"k\[1\] must be at least 0, got -2"),
        ({"k": [1, 2.0]}, TypeError, r"k\[1\] must be an int, got 2.0"),
        ({"k": 2.0}, TypeError, "k must be an int, got 2.0"),
        ({"k": "2"}, TypeError, r"k\[0\] must be an int, got '2'"),
        ({"k": torch.ones(2)}, TypeError, "k must have .*dtype.*, got torch.float32"),
        (
            {"k": torch.ones(2, 4).int()},
            ValueError,
            r"k must have a shape that broadcasts to \[1, 2, 4, 1\], got \[2, 4\]",
        ),
        (
            {"k": torch.ones(2, device="meta").int()},
            ValueError,
            "k must be on the device of scores, cpu, got meta",
        ),
    ],
)
def test_errors_of_top_k(arguments, error, words):
    for function in (top_k_blocks, top_k_indices):
        with pytest.raises(error, match=words):
            function(torch.zeros(1, 2, 4, 5), **arguments)


@st.composite
def tied_probabilities(draw):
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    return tied(draw, rows, columns, [0.0, -1.0, NAN, 1 / 64, 3 / 64, 0.125, 0.25, 0.5, 1.0])


@settings(max_examples=150)
@given(
    tied_probabilities(),
    st.sampled_from([0, 1 / 64, 0.25, 0.75, 0.8, 1, 3]),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(0, 5)),
    st.booleans(),
    st.sampled_from([1, 1 << 24]),
)
@example([[0.5, 0.25, 0.25]], 0.75, 1, None, False, 1)
def test_top_p(rows, p, least, more, by_row, slices):
    """The smallest set, exactly: the numbers are multiples of 1/64."""
    most = None if more is None else least + more
    given_p = torch.full((len(rows), 1), float(p)) if by_row else p
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "SLICE", slices)
        chosen = top_p_blocks(torch.tensor(rows), given_p, min_blocks=least, max_blocks=most)
    for row, blocks in zip(rows, chosen, strict=True):
        there = sorted((n for n, x in enumerate(row) if x > 0), key=lambda n: (-row[n], n))
        count, mass = 0, Fraction(0)
        while count < len(there) and (mass < Fraction(p) or count < least):
            mass += Fraction(row[there[count]])
            count += 1
        expected = there[: count if most is None else min(count, most)]
        assert blocks.nonzero()[:, 0].tolist() == sorted(expected)


def test_ties_of_long_rows():
    """Where sorting is not stable by chance."""
    first = torch.arange(5000) < 100
    assert torch.equal(top_k_blocks(torch.zeros(3, 5000), 100)[2], first)
    assert torch.equal(top_p_blocks(torch.full((3, 5000), 1 / 4096), 100 / 4096)[2], first)


def test_top_p_takes_one_at_least_and_all_at_most():
    rows = normal(4, 50).softmax(-1)
    assert torch.equal(top_p_blocks(rows, 0), rows == rows.amax(-1, keepdim=True))
    assert top_p_blocks(rows, 1.1).all()
    assert not top_p_blocks(torch.zeros(2, 3), 0.5).any()


ROWS = normal(2, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_k_blocks(ROWS, -1), ValueError, "k must be at least 0, got -1"),
        (lambda: top_k_blocks(ROWS, True), TypeError, "k must be an int, got True"),
        (
            lambda: top_k_blocks(ROWS.int(), 1),
            TypeError,
            "scores must have .*dtype.*, got torch.int32",
        ),
        (lambda: top_p_blocks(ROWS, -0.1), ValueError, "p must be from 0 to.*, got -0.1"),
        (lambda: top_p_blocks(ROWS, NAN), ValueError, "p must be from 0 to.*, got nan"),
        (lambda: top_p_blocks(ROWS, "1"), TypeError, "p must be a number, got '1'"),
        (
            lambda: top_p_blocks(ROWS, 0.5, min_blocks=0),
            ValueError,
            "min_blocks must be at least 1, got 0",
        ),
        (
            lambda: top_p_blocks(ROWS, 0.5, min_blocks=3, max_blocks=2),
            ValueError,
            "max_blocks must be at least 3, got 2",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_share_for_each_head():
    scores = normal(2, 3, 5, 10)
    scores[..., 7:] = -INF
    shares_ = (0.0, 0.5, 1.0)
    found = top_k_blocks(scores, density=shares_)
    for head, share in enumerate(shares_):
        assert found[:, head].equal(top_k_blocks(scores[:, head], density=share))
    counts, _ = top_k_indices(scores, density=shares_)
    assert counts[0, :, 0].tolist() == [0, 4, 7]
    with pytest.raises(ValueError, match="density must be one number, or one for each head"):
        top_k_blocks(scores, density=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"density\[1\] must be"):
        top_k_blocks(scores, density=(0.5, 1.5, 0.5))
