"""How the keys of decode attention are shared among thread blocks: each once, merged in order."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_fmha import _C

TILE, ROWS = 64, 64
decode = _C.decode


def pieces_of(first, cut):
    """(part, group, from, to), as the kernel finds them: from a part's first unit on."""
    pieces = []
    for part in range(cut.count()):
        unit, end = cut.begin(part), cut.begin(part + 1)
        assert unit < end  # no part is empty
        group = decode.group_of(first, unit)
        while unit < end:
            stop = min(first[group + 1], end)
            if unit < stop:
                pieces.append((part, group, unit, stop))
                unit = stop
            group += 1
    return pieces


def check(units, cut):
    """Each unit of each group is in one piece, and the pieces of a group can be merged in order."""
    first = [0, *itertools.accumulate(units)]
    assert cut.begin(0) == 0
    assert cut.begin(cut.count()) == first[-1]
    pieces = pieces_of(first, cut)
    assert [u for _, _, unit, stop in pieces for u in range(unit, stop)] == list(range(first[-1]))
    for part, group, unit, stop in pieces:
        assert first[group] <= unit < stop <= first[group + 1]
        assert {cut.part_of(u) for u in range(unit, stop)} == {part}
        assert {decode.group_of(first, u) for u in range(unit, stop)} == {group}
    merged = []
    for group in range(len(units)):
        own = [(part, unit) for part, of, unit, _ in pieces if of == group]
        parts = [part for part, _ in own]
        assert parts == list(range(parts[0], parts[0] + len(parts))) if parts else not units[group]
        if len(own) > 1:
            merged += [decode.place(part, unit == first[group]) for part, unit in own]
    assert len(merged) == len(set(merged))
    assert all(0 <= place < decode.places(cut.count()) for place in merged)


GROUPS = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(GROUPS, st.integers(1, 20), st.sampled_from([1, 3, 8]))
@example([0, 0, 3, 0], 132, 8)
@example([0], 4, 8)
@example([48, 0, 1], 1, 8)
def test_units_are_in_one_piece_each(units, blocks, short_parts):
    cut = decode.Parts(sum(units), blocks, short_parts)
    check(units, cut)
    assert cut.count() <= blocks * (1 + short_parts)
    assert cut.count() <= decode.most_count(sum(units), blocks, short_parts)


@settings(max_examples=50, deadline=None)
@given(GROUPS)
def test_splits_are_parts(units):
    cut = decode.each_unit(sum(units))
    assert cut.count() == sum(units)
    check(units, cut)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 300))
def test_equal_parts(units, workers):
    """Worker i has part i, or none; parts differ in the last one alone."""
    cut = decode.equal_parts(units, workers)
    assert cut.count() <= min(units, workers)
    begins = [cut.begin(part) for part in range(cut.count() + 1)]
    assert (begins[0], begins[-1]) == (0, units)
    sizes = [b - a for a, b in itertools.pairwise(begins)]
    assert min(sizes, default=1) > 0
    assert len(set(sizes[:-1])) <= 1
    assert max(sizes, default=0) <= -(-units // workers)


@settings(max_examples=50, deadline=None)
@given(GROUPS, st.integers(1, 20))
def test_equal_parts_of_groups(units, workers):
    check(units, decode.equal_parts(sum(units), workers))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 300), st.sampled_from([1, 3, 8]), st.data())
@example(2**30, 132, 8, None)
def test_many_units(units, blocks, short_parts, data):
    cut = decode.Parts(units, blocks, short_parts)
    count = cut.count()
    assert count <= blocks * (1 + short_parts)
    assert count <= decode.most_count(units, blocks, short_parts)
    begins = [cut.begin(part) for part in range(count + 1)]
    assert (begins[0], begins[-1]) == (0, units)
    sizes = [b - a for a, b in itertools.pairwise(begins)]
    assert min(sizes, default=1) > 0
    assert len(set(sizes)) <= 3  # long ones, short ones, and the last
    for unit in [data.draw(st.integers(0, units - 1))] if data and units else []:
        part = cut.part_of(unit)
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
