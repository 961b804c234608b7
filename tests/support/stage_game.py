"""Stages between producers and two consumers of a Hopper kernel, as a game: the pieces.

What is played, and what is not, is in tests/host/test_list_ring.py.
"""

import random


class Barrier:
    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.phase = 0
        self.bytes = 0

    def arrive(self, count=1, expect=0):
        self.bytes += expect
        self.pending -= count
        assert self.pending >= 0, "more arrivals than the barrier counts"
        self._turn()

    def land(self, count):
        self.bytes -= count
        self._turn()

    def _turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.arrivals

    def passed(self, parity):
        """What try_wait.parity answers: whether the phase of that parity is the completed one."""
        return self.phase % 2 != parity


class Ring:
    def __init__(self, stages, producers):
        self.full = [Barrier(producers) for _ in range(stages)]
        self.empty = [Barrier(2) for _ in range(stages)]
        self.content = [None] * stages
        self.published = [None] * (2 * stages)  # of keys: what a mask is looked up in


class State:
    def __init__(self, stages, count=0):
        self.stages, self.count = stages, count

    @property
    def index(self):
        return self.count % self.stages

    @property
    def phase(self):
        return self.count // self.stages % 2

    def plus(self, n):
        return State(self.stages, self.count + n)


def slot(at):
    """published_place()"""
    return at.index + at.phase * at.stages


def producer(ring, tiles, flights, gathers):
    """Of the keys, or of the values. With `gathers` it only says what the stage is."""
    at = State(len(ring.full))
    for tile, stages in enumerate(tiles):
        for i in range(sum(stages)):
            ring.published[slot(at)] = (tile, i)  # before the stage is free
            yield lambda at=at: ring.empty[at.index].passed(at.phase ^ 1)
            if not gathers:
                ring.content[at.index] = "in flight"
                flights.append((ring, at.index, (tile, i), lambda full: full.land(1)))
            ring.full[at.index].arrive(expect=0 if gathers else 1)
            at = at.plus(1)


def wait(ring, at):
    yield lambda: ring.full[at.index].passed(at.phase)


def holds(ring, at, what):
    """Asserts that the stage is what a consumer takes it for."""
    assert ring.content[at.index] == ring.published[slot(at)] == what, "overwritten, or another"


def read(ring, at, what):
    holds(ring, at, what)
    yield lambda: True  # others run while it is being read
    holds(ring, at, what)


def release(ring, at):
    ring.empty[at.index].arrive()


def enter(ring, at, follows_other):
    if follows_other:
        yield from wait(ring, at.plus(-1))
        release(ring, at.plus(-1))
    yield from wait(ring, at)


def play(actors, flights, seed):
    """Actors take turns at random, and copies under way, `flights`, land when they like."""
    rng = random.Random(seed)
    landing = len(actors)
    waits = [lambda: True] * len(actors)
    speeds = [rng.choice([1, 1, 5, 25]) for _ in range(landing + 1)]
    alive = set(range(landing))
    while alive or flights:
        ready = [a for a in alive if waits[a]()] + ([landing] if flights else [])
        assert ready, "nobody can go on"
        who = rng.choices(ready, [speeds[a] for a in ready])[0]
        if who == landing:
            ring, index, what, land = flights.pop(rng.randrange(min(2, len(flights))))
            ring.content[index] = what
            land(ring.full[index])
            continue
        try:
            waits[who] = next(actors[who])
        except StopIteration:
            alive.remove(who)
