"""The hand-over of stages between the Hopper kernel's producers and its two consumers, as a game.

What runs here is a copy of the protocol in Python, not the kernel. Barriers count arrivals and
bytes as the hardware's do and tell only two phases apart; producers and consumers take turns at
random and copies land when they like. In none of the games drawn may a consumer find another stage
than the one it is at, a stage be overwritten while it is read, a barrier get an arrival too many,
or all wait. That is no proof for every order of events.

Of the kernel's own code are only the order of the stages and which of them a consumer passes over
(planning/list_stages.h, by `_C`). test_list_ring_rules.py quotes the lines of rings, producers and
stages that the game was written after, and fails when one of them changes: then the game has to
follow. The order in which a consumer reads keys and values, of accumulation.h, is copied
and not quoted. Left out are warps and lanes (a consumer arrives once, a gatherer once), the slot of
the query tile and its queries, the turns of the consumers, tiles that are skipped by their scores,
bitmasks, which arrive at the barrier of the keys, proxies and fences. Only tests on a GPU and
compute-sanitizer see the order of memory.
"""

import pytest
import stage_game
from hypothesis import given
from hypothesis import strategies as st
from stage_game import Ring, State, enter, producer, read, release, wait

import kernel_list

_C = pytest.importorskip("sparse_fmha._C")

STAGES = (2, 3)


def gatherer(k, v, tiles, flights):
    """Copies rows of both in the order of use; a copy arrives when it has landed."""
    at = State(len(k.full))
    for tile, stages in enumerate(tiles):
        total = sum(stages)
        for i in range(total + 1):
            for ring, behind in ((k, 0), (v, 1)):
                if 0 <= i - behind < total:
                    place = at.plus(-behind)
                    yield lambda r=ring, p=place: r.empty[p.index].passed(p.phase ^ 1)
                    ring.content[place.index] = "in flight"
                    what = (tile, i - behind)
                    flights.append((ring, place.index, what, lambda full: full.arrive()))
            if i < total:
                at = at.plus(1)


def consumer(k, v, tiles, who):
    state = State(len(k.full))

    for tile, stages in enumerate(tiles):
        places = _C.consumer_places(stages, who)
        total = sum(stages)
        first = state
        previous = None
        for i, (place, follows) in enumerate(places):
            state = state.plus(1 if i else 0).plus(1 if follows else 0)
            assert state.count == first.count + place
            yield from enter(k, state, follows)
            yield from read(k, state, (tile, place))
            if previous:
                yield from enter(v, previous[0], previous[2])
                yield from read(v, previous[0], (tile, previous[1]))
            release(k, state)
            if previous:
                release(v, previous[0])
            previous = (state, place, follows)
        if previous:
            yield from enter(v, previous[0], previous[2])
            yield from read(v, previous[0], (tile, previous[1]))
            release(v, previous[0])
            state = state.plus(1)
        while state.count < first.count + total:  # pass_over()
            for ring in (k, v):
                yield from wait(ring, state)
                release(ring, state)
            state = state.plus(1)


def play(tiles, stages, seed, gathers=False):
    k, v, flights = Ring(stages, 1 + gathers), Ring(stages, 1 + gathers), []
    actors = [producer(ring, tiles, flights, gathers) for ring in (k, v)]
    actors += [consumer(k, v, tiles, w) for w in range(2)]
    if gathers:
        actors.append(gatherer(k, v, tiles, flights))
    stage_game.play(actors, flights, seed)


counts = st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9))


@given(
    st.lists(counts, max_size=6), st.sampled_from(STAGES), st.integers(0, 1 << 30), st.booleans()
)
def test_stages_go_round(tiles, stages, seed, gathers):
    for s in range(5):
        play(tiles, stages, seed + s, gathers)


def test_rings_of_the_kernels_are_played():
    rows = [row for row in kernel_list.read_all() if row.mechanism in ("BlockSparse", "Stripe")]
    rows = [row for row in rows if row.direction == "forward"]
    assert {row.stages for row in rows if row.arch.family == "sm90"} == set(STAGES)


@given(counts)
def test_order_of_stages(stages):
    """Each stage of each stream comes once, and those of a consumer's own in ascending order."""
    order = _C.stream_places(stages)
    assert sorted(order) == [(s, i) for s, n in enumerate(stages) for i in range(n)]
    for who in range(2):
        own = [order[place] for place, _ in _C.consumer_places(stages, who)]
        assert own == [(0, i) for i in range(stages[0])] + [
            (1 + who, i) for i in range(stages[1 + who])
        ]
        before = -1
        for place, follows in _C.consumer_places(stages, who):
            assert place == before + 1 + follows
            before = place


def test_a_consumer_that_passes_over_in_silence_is_caught():
    """The game would tell: one that does not give stages of the other back stops everything."""

    def deaf(k, v, tiles, who):
        for _ in tiles:
            yield lambda: True

    original = globals()["consumer"]
    try:
        globals()["consumer"] = lambda k, v, tiles, who: (original if who == 0 else deaf)(
            k, v, tiles, who
        )
        with pytest.raises(AssertionError, match="nobody can go on"):
            play([(0, 9, 0)], 2, 0)
    finally:
        globals()["consumer"] = original
