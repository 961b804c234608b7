"""Counting and choosing tiles (`_C.tiles`): against sums over the kernel's walks and masks made
token by token.
"""

import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tilings import extents, powers, problems, token_mask, walks

from sparse_fmha import _C

ONES, ZEROS = (1, 1, 1), (0, 0, 0)
COSTS = (1.0, 1.5, 0.75)  # exact in binary, so that equal costs are equal however they are summed


@settings(max_examples=300, deadline=None)
@given(problems(), extents(), extents())
@example((((1, 1, 7), (1, 1, 2), ONES, (1, 1, 3), ZEROS), 1), (1, 1, 2), (1, 1, 1))
def test_counts_are_sums_over_the_walks(drawn, q, k):
    problem, _ = drawn
    visits = [(partial + full, full) for partial, full in walks(problem, (q, k))]
    visited, full = zip(*visits, strict=True)
    expected = len(visits), sum(visited), sum(full), max(visited)
    assert _C.tiles.count(problem, (q, k)) == expected
    groups = sorted((v for n, *v in _C.tiles.groups(problem, (q, k)) for _ in range(n)))
    assert groups == sorted(map(list, visits))


def boxes_of_tokens(problem, extent):
    """{(residue, tile): tokens} of the tiling of the grid by a box, in each dilation class."""
    grid, dilation = problem[0], problem[3]
    boxes = {}
    for index, token in enumerate(itertools.product(*map(range, grid))):
        residue = tuple(t % d for t, d in zip(token, dilation, strict=True))
        tile = tuple(t // d // e for t, d, e in zip(token, dilation, extent, strict=True))
        boxes.setdefault((residue, tile), []).append(index)
    return boxes


@settings(max_examples=200, deadline=None)
@given(problems(((1, 60), (2, 11), (3, 6))), extents(6), extents(6))
def test_static_counts_token_by_token(drawn, q, k):
    """Tiles on the key grid between the first and the last that hold a key which is seen; full are
    those whose keys are all in range and all seen by all queries."""
    problem, rank = drawn
    mask = token_mask(problem, rank)
    keys = boxes_of_tokens(problem, k)
    visits = []
    for (residue, _), queries in boxes_of_tokens(problem, q).items():
        seen = mask[queries]
        tiles = [
            tile for (r, tile), tokens in keys.items() if r == residue and seen[:, tokens].any()
        ]
        visited = math.prod(max(line) - min(line) + 1 for line in zip(*tiles, strict=True))
        assert visited == len(tiles), "what a query tile sees is a box of tiles"
        full = sum(
            len(tokens) == math.prod(k) and seen[:, tokens].all()
            for (r, _), tokens in keys.items()
            if r == residue
        )
        visits.append((visited, full))
    visited, full = zip(*visits, strict=True)
    expected = len(visits), sum(visited), sum(full), max(visited)
    assert _C.tiles.count(problem, (q, k), static=True) == expected
    groups = sorted(v for n, *v in _C.tiles.groups(problem, (q, k), True) for _ in range(n))
    assert groups == sorted(map(list, visits))


@pytest.mark.parametrize("rows", [1, 64, 128])
@pytest.mark.parametrize("limits", [(256, 256, 256), (1, 8, 32), (3, 85, 85), (2, 2, 2)])
def test_boxes(rows, limits):
    boxes = _C.tiles.boxes(rows, limits)
    assert sorted(boxes) == powers(rows, limits)
    assert len(set(boxes)) == len(boxes)


@pytest.mark.parametrize(
    ("grid", "dilation", "box"),
    [
        ((1, 1, 1), (1, 1, 1), (1, 1, 256)),  # a tile has to lie somewhere
        ((5, 1, 1), (1, 1, 1), (256, 1, 1)),
        ((1, 1, 300), (1, 1, 1), (1, 1, 256)),
        ((1, 1, 300), (1, 1, 6), (1, 1, 128)),  # a single axis keeps room for a whole tile
        ((1, 1, 300), (1, 1, 7), (1, 1, 256)),
        ((1, 20, 300), (1, 8, 12), (1, 32, 42)),
        ((9, 1, 300), (2, 1, 11), (128, 1, 256)),
    ],
)
def test_largest_box(grid, dilation, box):
    """No box is longer than 1 on an axis of length 1: tensor maps may lack that axis, and a copy of
    fewer tokens than the kernel waits for never ends. The last axis is in every map."""
    assert _C.tiles.max_box(grid, dilation) == box


def test_boxes_of_no_power_of_two():
    assert _C.tiles.boxes(96, (256, 256, 256)) == []


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([8, 16]), st.sampled_from([4, 16]))
def test_choice_is_the_cheapest_legal_pair(drawn, rows_q, rows_k):
    problem, _ = drawn
    limits = tuple(16 // min(d, 8) for d in problem[3])
    lengths = [-(-n // d) for n, d in zip(problem[0], problem[3], strict=True)]

    def legal(rows):
        """Within the grid, to the next power of two; beyond it only if there is nothing else."""
        for beyond in itertools.count():
            reach = [(1 << (n - 1).bit_length()) << beyond for n in lengths]
            boxes = powers(rows, [min(r, limit) for r, limit in zip(reach, limits, strict=True)])
            if boxes:
                return boxes
            if all(r >= limit for r, limit in zip(reach, limits, strict=True)):
                return []

    def key(q, k):
        visits = walks(problem, (q, k))
        partial, full = (sum(numbers) for numbers in zip(*visits, strict=True))
        cost = len(visits) * COSTS[2] + full * COSTS[0] + partial * COSTS[1]
        return cost, partial, -k[2], -q[2], -k[1], -q[1]

    pairs = {pair: key(*pair) for pair in itertools.product(legal(rows_q), legal(rows_k))}
    if not pairs:
        with pytest.raises(RuntimeError, match=r"no box of .* tokens"):
            _C.tiles.choose(problem, rows_q, rows_k, limits, COSTS)
        return
    ranked = _C.tiles.rank(problem, rows_q, rows_k, limits, COSTS)
    assert [(q, k) for q, k, *_ in ranked] == sorted(pairs, key=pairs.get)
    assert [cost for *_, cost in ranked] == sorted(cost for cost, *_ in pairs.values())
    assert all(count == _C.tiles.count(problem, (q, k)) for q, k, count, _ in ranked)
    for _ in range(2):  # the second time from the cache
        assert _C.tiles.choose(problem, rows_q, rows_k, limits, COSTS) == ranked[0][:2]


def test_what_is_kept_is_told_apart():
    """Each argument of choose() makes a difference, also where another was chosen for before, and
    there may be more of them than are kept."""
    grid, window, stride = (30, 48, 80), (13, 13, 13), (4, 4, 4)
    problem = grid, window, stride, ONES, ZEROS
    limits = (256, 256, 256)
    first = _C.tiles.choose(problem, 128, 128, limits, COSTS)
    others = [
        (((30, 16, 80), window, stride, ONES, ZEROS), 128, 128, limits, COSTS),
        ((grid, (13, 13, 32), stride, ONES, ZEROS), 128, 128, limits, COSTS),
        ((grid, window, (13, 1, 13), ONES, ZEROS), 128, 128, limits, COSTS),
        ((grid, window, stride, (1, 2, 1), ZEROS), 128, 128, limits, COSTS),
        ((grid, window, stride, ONES, (1, 0, 0)), 128, 128, limits, COSTS),
        (problem, 64, 128, limits, COSTS),
        (problem, 128, 64, limits, COSTS),
        (problem, 128, 128, (256, 256, 4), COSTS),
        (problem, 128, 128, limits, (0.01, 1.5, 0.75)),
        (problem, 128, 128, limits, (1.0, 50.0, 0.75)),
        (problem, 128, 128, limits, (1.0, 1.5, 500.0)),
    ]
    for _ in range(2):
        for arguments in others:
            chosen = _C.tiles.choose(*arguments)
            assert chosen == _C.tiles.rank(*arguments)[0][:2]
            assert chosen != first, "the case shows nothing"
    for tokens in range(100, 1400):
        _C.tiles.choose(((1, 1, tokens), (1, 1, 9), ONES, ONES, ZEROS), 128, 128, limits, COSTS)
    assert _C.tiles.choose(problem, 128, 128, limits, COSTS) == first


def test_choice_from_many_threads():
    """Threads that find what others have chosen, and make room for their own."""
    problems = [((1, 1, n), (1, 1, 9), ONES, ONES, ZEROS) for n in range(200, 1400)]
    arguments = 128, 128, (256, 256, 256), COSTS

    def choose(_):
        return {_C.tiles.choose(problem, *arguments) for problem in problems}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads that wait for the interpreter need not wait long
    try:
        with ThreadPoolExecutor(4) as pool:
            chosen = list(pool.map(choose, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert chosen == [{((1, 1, 128), (1, 1, 128))}] * 8
