"""How the keys of decode attention are shared among thread blocks: each once, merged in order."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_fmha import _C

TILE, ROWS = 64, 64
decode = _C.decode


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 40), st.booleans())
@example([0, 0, 3, 0], 132, False)
@example([0], 4, False)
@example([7, 0, 1], 1, False)
def test_units_are_in_one_piece_each(units, parts, splits):
    """Pieces as the kernel finds them: a part goes from its first unit through the groups. With
    fixed splits each unit is a part."""
    first = [0, *itertools.accumulate(units)]
    total = first[-1]
    parts = total if splits else parts
    begins = decode.begins(total, parts) if parts else [0]
    assert begins[0] == 0
    assert begins[-1] == total
    sizes = [b - a for a, b in itertools.pairwise(begins)]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    pieces = []  # part, group, from, to
    for part, (unit, end) in enumerate(itertools.pairwise(begins)):
        group = decode.group_of(first, unit) if unit < end else 0
        while unit < end:
            stop = min(first[group + 1], end)
            if unit < stop:
                pieces.append((part, group, unit, stop))
                unit = stop
            group += 1
    assert [u for _, _, unit, stop in pieces for u in range(unit, stop)] == list(range(total))
    for part, group, unit, stop in pieces:
        assert first[group] <= unit < stop <= first[group + 1]
        assert {decode.part_of(total, parts, u) for u in range(unit, stop)} == {part}
        assert {decode.group_of(first, u) for u in range(unit, stop)} == {group}
    for group in range(len(units)):
        own = [part for part, of, *_ in pieces if of == group]
        assert own == sorted(set(own))  # the merge goes through the parts in order
    # What is merged of a part: at most one piece that begins its group and one that goes on.
    merged = [
        (part, unit == first[group])
        for part, group, unit, stop in pieces
        if (unit, stop) != (first[group], first[group + 1])
    ]
    assert len(merged) == len(set(merged))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**44), st.integers(1, 300), st.data())
def test_many_units(units, parts, data):
    begins = decode.begins(units, parts)
    assert begins == [part * units // parts for part in range(parts + 1)]
    unit = data.draw(st.integers(0, units - 1))
    part = decode.part_of(units, parts, unit)
    assert begins[part] <= unit < begins[part + 1]


@st.composite
def heads(draw):
    """A KV head of one request: the arguments of `tiles`, and its form."""
    number = draw(st.integers(0, 400))
    form = draw(st.sampled_from(["all", "span", "blocks", "tokens", "tokens by query"]))
    len_q = draw(st.integers(1, 20))
    given = {
        "length": draw(st.integers(-3, 450)), "capacity": number, "len_q": len_q,
        "group": draw(st.integers(1, 9)), "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 1, 30, 150])),
        "split": draw(st.sampled_from([0, 64, 192])), "span": None, "block": 0, "counts": None,
        "width": 0,
    }  # fmt: skip
    if form == "span":
        given["span"] = draw(st.tuples(st.integers(-5, 450), st.integers(-5, 450)))
    elif form != "all":
        lists = len_q if form == "tokens by query" else 1
        given["counts"] = draw(st.lists(st.integers(-1, 300), min_size=lists, max_size=lists))
        given["width"] = draw(st.integers(0, 250))
        given["block"] = draw(st.sampled_from([16, 64, 128])) if form == "blocks" else 0
    return given


def seen_slots(given, query):
    """Slots that a query may see; entries of lists may be any positions."""
    if given["counts"] is not None:
        counts = given["counts"]
        count = counts[query if len(counts) > 1 else 0]
        return range(max(min(count, given["width"]), 0) * (given["block"] or 1))
    end = max(min(given["length"], given["capacity"]), 0)
    begin = 0
    if given["span"] is not None:
        start, length = given["span"]
        begin = min(max(start, 0), end)
        end = min(max(start + length, begin), end)
    own = end - given["len_q"] + query
    return [
        j - begin
        for j in range(begin, end)
        if (not given["causal"] or j <= own) and (given["window"] == 0 or j > own - given["window"])
    ]


@settings(max_examples=300, deadline=None)
@given(heads())
def test_tiles_have_what_is_seen(given):
    """Every slot that a row of the group may see, and no tile more; from the start of a split."""
    len_q, group = given["len_q"], given["group"]
    by_query = given["counts"] is not None and len(given["counts"]) > 1
    lists = [[q] for q in range(len_q)] if by_query else [range(len_q)]
    rows = [[q for q in queries for _ in range(group)] for queries in lists]
    groups = [own[i : i + ROWS] for own in rows for i in range(0, len(own), ROWS)]
    found = decode.tiles(**given)
    assert len(found) == len(groups)
    unit = (given["split"] or TILE) // TILE
    for (begin, end), queries in zip(found, groups, strict=True):
        seen = {slot // TILE for query in set(queries) for slot in seen_slots(given, query)}
        if not seen:
            assert begin == end
            continue
        assert (begin, end) == (min(seen) // unit * unit, max(seen) + 1)
