"""The hand-over of keys, votes and values in the decode kernels that skip tiles, as a game.

What runs here is a copy of the protocol of sm90/decode (producer.h, walk.h) in Python, with the
barriers of stage_game.py: producers and the consumer take turns at random and copies land when they
like. The consumer may not find another tile than the one it is at, no stage may be overwritten
while it is read, and nobody may wait for ever. Warps count once here, and the order of memory is
not played.
"""

import pytest
import stage_game
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_game import Barrier, State

import kernel_list

DEPTH = 4  # NumberQueue::kDepth
STAGES = (3, 6)
AHEAD = 2  # DecodeTraits::kKeysAhead


class Ring:
    def __init__(self, stages, arrivals, readers=1):
        self.full = [Barrier(arrivals) for _ in range(stages)]
        self.empty = [Barrier(readers) for _ in range(stages)]
        self.content = [None] * stages

    def start(self):
        return State(len(self.full))

    def acquire(self, at):
        yield lambda: self.empty[at.index].passed(at.phase ^ 1)

    def wait(self, at):
        yield lambda: self.full[at.index].passed(at.phase)

    def put(self, at, what, flights):
        """A copy that arrives when it has landed."""
        assert self.content[at.index] in (None, what), "the stage is still read"
        flights.append((self, at.index, what, lambda full: full.arrive()))


class Values:
    """What a warp that copies values knows of the votes."""

    def __init__(self, game):
        self.game, self.votes, self.at = game, game.votes.start(), game.v.start()

    def copy_if_kept(self, tile):
        queue, ring = self.game.votes, self.game.v
        yield from queue.wait(self.votes)
        voted, kept = queue.content[self.votes.index]
        assert voted == tile
        queue.empty[self.votes.index].arrive()
        self.votes = self.votes.plus(1)
        if kept:
            yield from ring.acquire(self.at)
            ring.put(self.at, tile, self.game.flights)
            self.at = self.at.plus(1)


class Game:
    def __init__(self, pieces, stages, gathers, ahead=AHEAD):
        self.pieces, self.ahead, self.flights = pieces, ahead, []
        copying = 2 if gathers else 1
        self.k, self.v = Ring(stages, copying), Ring(stages - 1, copying)
        self.votes = Ring(DEPTH, 1, copying)
        copiers = [self.rows(), self.rows()] if gathers else [self.keys(), self.values()]
        self.actors = [*copiers, self.consumer()]

    def tiles(self):
        for number, piece in enumerate(self.pieces):
            yield [(number, i) for i in range(len(piece))]

    def keys(self):
        at = self.k.start()
        for tiles in self.tiles():
            for tile in tiles:
                yield from self.k.acquire(at)
                self.k.put(at, tile, self.flights)
                at = at.plus(1)

    def values(self):
        values = Values(self)
        for tiles in self.tiles():
            for tile in tiles:
                yield from values.copy_if_kept(tile)

    def rows(self):
        """One of two producers of both: values follow keys by `ahead` tiles."""
        at, values = self.k.start(), Values(self)
        for tiles in self.tiles():
            for i, tile in enumerate(tiles):
                yield from self.k.acquire(at)
                self.k.put(at, tile, self.flights)
                at = at.plus(1)
                if i >= self.ahead:
                    yield from values.copy_if_kept(tiles[i - self.ahead])
            for tile in tiles[-self.ahead :]:
                yield from values.copy_if_kept(tile)

    def consumer(self):
        keys, values, votes = self.k.start(), self.v.start(), self.votes.start()

        def read(ring, at, tile):
            yield from ring.wait(at)
            assert ring.content[at.index] == tile, "another tile"
            yield lambda: True  # others run while it is read
            assert ring.content[at.index] == tile, "overwritten"
            ring.content[at.index] = None
            ring.empty[at.index].arrive()

        for number, piece in enumerate(self.pieces):
            last = None
            for i, kept in enumerate(piece):
                yield from read(self.k, keys, (number, i))
                keys = keys.plus(1)
                yield from self.votes.acquire(votes)
                self.votes.content[votes.index] = (number, i), kept
                self.votes.full[votes.index].arrive()
                votes = votes.plus(1)
                if not kept:
                    continue
                if last is not None:
                    yield from read(self.v, values, last)
                    values = values.plus(1)
                last = (number, i)
            if last is not None:
                yield from read(self.v, values, last)
                values = values.plus(1)

    def play(self, seed):
        stage_game.play(self.actors, self.flights, seed)


PIECES = st.lists(st.lists(st.booleans(), min_size=1, max_size=20), max_size=5)


@settings(max_examples=60, deadline=None)
@given(PIECES, st.sampled_from(STAGES), st.booleans(), st.integers(0, 1 << 30))
def test_tiles_are_handed_over(pieces, stages, gathers, seed):
    for s in range(4):
        Game(pieces, stages, gathers).play(seed + s)


def test_values_may_not_stay_further_behind():
    for ahead in range(1, 7):
        game = Game([[True] * 20], 3, gathers=True, ahead=ahead)
        if ahead <= 4:
            game.play(0)
        else:
            with pytest.raises(AssertionError, match="nobody can go on"):
                game.play(0)


def test_stages_of_the_kernels_are_played():
    rows = [row for row in kernel_list.read_all() if row.direction == "decode" and row.skips]
    assert {row.stages for row in rows if row.arch.family == "sm90"} == set(STAGES)
