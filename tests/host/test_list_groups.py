"""The merged list of a group of query blocks, whose key blocks are spread by integer code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

_C = pytest.importorskip("sparse_fmha._C")

SETS = range(1, 8)  # of three members, as bits
FEW = st.lists(st.integers(0, 12), min_size=len(SETS), max_size=len(SETS))
MANY = st.lists(st.sampled_from([0, 1, 700, 4000]), min_size=len(SETS), max_size=len(SETS))


@given(FEW | MANY)
def test_each_place_is_taken_once(counts):
    places = _C.spread_places(counts)
    assert [len(own) for own in places] == counts
    assert all(own == sorted(own) for own in places)
    assert sorted(place for own in places for place in own) == list(range(sum(counts)))


@given(FEW | MANY)
def test_members_have_work_all_along_the_list(counts):
    """In each part of the list from its beginning, a member sees its share of the entries."""
    sets = np.zeros(sum(counts), dtype=int)
    for members, own in zip(SETS, _C.spread_places(counts), strict=True):
        sets[own] = members
    length = np.arange(1, len(sets) + 1)
    for member in range(3):
        seen = (sets >> member & 1).cumsum()
        if len(sets):
            assert np.abs(seen - length * seen[-1] / len(sets)).max() <= len(SETS)


def test_the_largest_counts():
    largest = 2**15 - 1
    places = _C.spread_places([largest // 2, 0, 0, 0, 0, 0, largest])
    assert places[-1][-1] == largest + largest // 2 - 1


def test_each_set_has_a_count():
    with pytest.raises(ValueError, match="7 sets of members, got counts of 3"):
        _C.spread_places([1, 2, 3])
