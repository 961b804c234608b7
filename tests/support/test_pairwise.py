"""Pairs of parameters: each occurs, in few rows."""

import itertools
import math

import pairwise
import pytest
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(0, 7), max_size=5))
def test_every_pair_occurs(sizes):
    parameters = [[f"{place}{value}" for value in range(n)] for place, n in enumerate(sizes)]
    rows = pairwise.pairwise(*parameters)
    assert rows == pairwise.pairwise(*parameters)
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(itertools.product(*parameters))
    for i, j in itertools.combinations(range(len(sizes)) if all(sizes) else (), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(itertools.product(parameters[i], parameters[j]))


@pytest.mark.parametrize("sizes", [(2, 9, 10, 2), (85, 4, 2), (14, 8, 2), (6, 6, 4), (2, 2, 4, 7)])
def test_few_rows(sizes):
    rows = pairwise.pairwise(*map(range, sizes))
    fewest = math.prod(sorted(sizes)[-2:])
    assert fewest <= len(rows) <= 1.2 * fewest
    assert len(rows) < math.prod(sizes)


def test_as_a_mark():
    names, rows = pairwise.parametrize(x=(1, 2), y=(max, "a"), z=(True, False)).mark.args
    assert names == ["x", "y", "z"]
    assert rows == pairwise.pairwise((1, 2), (max, "a"), (True, False))
