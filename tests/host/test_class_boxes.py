"""Boxes of dilation classes (planning/class_boxes.h): what tensor maps reach, where they clip.

The copy engine is a model in numpy: an element lies at the sum of coordinate times stride, and
exists if all coordinates are inside the map.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_fmha import _C

ONE = (1, 1, 1)
REACHED = [  # grid, dilation: one launch by element strides
    ((1, 100, 100), (1, 8, 7)),
    ((1, 1, 100), (1, 1, 2)),
    ((9, 9, 9), (3, 2, 3)),
]
BEYOND = [  # launches by element strides
    ((1, 300, 300), (1, 11, 11), 121),
    ((1, 300, 300), (1, 16, 1), 2),
    ((1, 1, 100), (1, 1, 3), 3),
    ((20, 40, 40), (2, 9, 13), 39),
]


@st.composite
def layouts(draw):
    """A problem in a tensor whose dimensions lie in memory in any order, with gaps."""
    axes = draw(st.integers(1, 3))
    grid, dilation = [1] * (3 - axes), [1] * (3 - axes)
    for _ in range(axes):
        step = draw(st.sampled_from([1, 2, 3, 9, 11, 13, 17]))
        per_class = draw(st.integers(1, 4 if axes < 3 else 2))
        grid.append(step * per_class + draw(st.integers(0, step - 1)))
        dilation.append(step)
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = [batch, heads, *grid]
    strides, stride = [0] * 5, 8 * draw(st.integers(1, 3))
    for place in draw(st.permutations(range(5))):
        strides[place] = stride
        stride *= sizes[place]
        stride += 8 * draw(st.integers(0, 2))
    problem = (tuple(grid), ONE, ONE, tuple(dilation), (0, 0, 0))
    return problem, heads, batch, tuple(strides)


class Model:
    """The maps of a tensor, and the boxes that kernels copy."""

    def __init__(self, problem, heads, batch, strides):
        self.problem = problem
        self.unit, self.extent, self.units, fits = _C.tiles.class_map(
            problem, heads, batch, strides
        )
        assert fits
        self.strides = [d * s for d, s in zip(problem[3], strides[2:], strict=True)]

    def elements(self, batch, head, residue, origin, box):
        """Where the elements of a box that exist lie, by their positions in it."""
        kind, extents = _C.tiles.class_kind(self.problem, residue)
        assert 0 <= kind < 8
        offset = np.dot(self.units, (batch, head, *residue))
        assert 0 <= offset < self.extent
        found = {}
        for place in itertools.product(*map(range, box)):
            at = np.add(origin, place)
            if (at >= 0).all() and (at < extents).all():
                found[place] = int(offset * self.unit + np.dot(at, self.strides))
        return found


def box_of(grid, dilation):
    """A box that some classes do not fill."""
    return tuple(min(2, -(-n // d)) for n, d in zip(grid, dilation, strict=True))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_query_tiles_store_every_row_once_and_nothing_else(layout):
    problem, heads, batch, strides = layout
    grid, _, _, dilation, _ = problem
    box = box_of(grid, dilation)
    walks = _C.walks.Neighborhood(*problem, box, box)
    model = Model(*layout)
    stored = []
    for b, h, i in itertools.product(range(batch), range(heads), range(walks.num_query_tiles())):
        residue, origin = walks.query_tile(i)
        found = model.elements(b, h, residue, origin, box)
        for place, element in found.items():
            token = walks.token(residue, tuple(np.add(origin, place)))
            assert element == np.dot(strides, (b, h, *token))
        stored += found.values()
    places = itertools.product(*map(range, (batch, heads, *grid)))
    rows = [int(np.dot(strides, place)) for place in places]
    assert sorted(stored) == sorted(rows)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.data())
def test_boxes_end_with_their_class(layout, data):
    """Wherever a box of keys begins: positions behind the class do not exist."""
    problem, heads, batch, strides = layout
    grid, dilation = problem[0], problem[3]
    residue = tuple(data.draw(st.integers(0, d - 1)) for d in dilation)
    lengths = [len(range(r, n, d)) for r, n, d in zip(residue, grid, dilation, strict=True)]
    origin = tuple(data.draw(st.integers(0, n - 1)) for n in lengths)
    found = Model(*layout).elements(batch - 1, heads - 1, residue, origin, (4, 4, 4))
    inside = [range(min(4, n - o)) for n, o in zip(lengths, origin, strict=True)]
    assert list(found) == list(itertools.product(*inside))
    for place, element in found.items():
        token = np.add(residue, np.multiply(dilation, np.add(origin, place)))
        assert element == np.dot(strides, (batch - 1, heads - 1, *token))


def test_dimensions_of_one_entry_may_have_any_stride():
    """The strides of such dimensions say nothing, also where they are odd or huge."""
    problem = ((1, 1, 30), ONE, ONE, (1, 1, 7), (0, 0, 0))
    unit, *_, fits = _C.tiles.class_map(problem, 1, 1, (2**60 + 1, 3, 5, 2**50, 64))
    assert (unit, fits) == (64, True)
    broadcast = _C.tiles.class_map(problem, 4, 3, (0, 0, 0, 0, 0))
    assert broadcast == (8, 1, (0, 0, 0, 0, 0), True)


@pytest.mark.parametrize(("batch", "fits"), [(1, True), (2, True), (3, False)])
def test_offsets_are_32_bit_numbers(batch, fits):
    """Of 2^30 rows of a head dim of 64 in a batch entry: many more than 2^31 elements."""
    heads = 2**14
    problem = ((1, 256, 256), ONE, ONE, (1, 17, 17), (0, 0, 0))
    strides = 64 * heads * 2**16, 64, 0, 64 * heads * 256, 64 * heads
    unit, extent, units, found = _C.tiles.class_map(problem, heads, batch, strides)
    assert found == fits
    if fits:
        assert unit == 64
        assert units[1:] == (1, 0, 256 * heads, heads)
        # The last batch entry and head of the class that begins last.
        assert extent == (batch - 1) * 2**30 + heads - 1 + 16 * 257 * heads + 1


@pytest.mark.parametrize(("grid", "dilation"), REACHED)
def test_dilations_that_the_copy_engine_strides_over(grid, dilation):
    assert _C.tiles.launches(grid, dilation) == 1
    assert _C.tiles.one_launch_box(grid, dilation) == _C.tiles.max_box(grid, dilation)


@pytest.mark.parametrize(("grid", "dilation", "launches"), BEYOND)
def test_larger_dilations(grid, dilation, launches):
    assert _C.tiles.launches(grid, dilation) == launches
    box = tuple(256 if n > 1 else 1 for n in grid)
    assert _C.tiles.one_launch_box(grid, dilation) == box
