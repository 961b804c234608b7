"""The ring of the kernel for groups of query blocks (sm90/list_groups), played as a game.

The producer, the landing of copies and three consumers take steps in any order. Played are the
barriers with their one bit of phase, so that a wait may be passed by mistake: then a consumer reads
the wrong tile, a stage is overwritten too early, or a barrier gets too many arrivals.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

MEMBERS, STAGES, NEAR = 3, 11, 2


class LostError(Exception):
    """The game is lost."""


class Barrier:
    def __init__(self, count):
        self.count = self.left = count
        self.phase = 0

    def arrive(self, many=1):
        self.left -= many
        if self.left < 0:
            raise LostError("too many arrivals")
        if self.left == 0:
            self.left, self.phase = self.count, self.phase + 1

    def passed(self, parity):
        return self.phase % 2 != parity


class Game:
    """entries: for each group the members of each entry, as bits."""

    def __init__(self, groups, near=NEAR, looks=True):
        self.groups, self.near, self.looks = groups, near, looks
        self.full = [Barrier(1) for _ in range(STAGES)]
        self.empty = [Barrier(MEMBERS) for _ in range(STAGES)]
        self.holds = [None] * STAGES  # the tile that has landed there
        self.flying = []
        self.begun = 0
        self.read = [[] for _ in range(MEMBERS)]

    def producer(self):
        tile = 0
        for group in self.groups:
            for members in group:
                for _ in "kv":
                    slot, phase = tile % STAGES, tile // STAGES % 2
                    yield lambda slot=slot, phase=phase: self.empty[slot].passed(phase ^ 1)
                    strangers = MEMBERS - members.bit_count()
                    if strangers:
                        self.empty[slot].arrive(strangers)
                    self.holds[slot] = None
                    self.flying.append(tile)
                    self.begun = tile + 1
                    tile += 1

    def copies(self):
        """Land in any order."""
        left = 2 * sum(map(len, self.groups))
        for _ in range(left):
            yield lambda: self.flying
            tile = self.flying.pop(random.randrange(len(self.flying)))
            self.holds[tile % STAGES] = tile
            self.full[tile % STAGES].arrive()

    def reach(self, member, tile):
        slot, phase = tile % STAGES, tile // STAGES % 2
        if self.looks:
            yield lambda: self.begun > tile
        yield lambda: self.full[slot].passed(phase)
        if self.holds[slot] != tile:
            raise LostError("not the tile that was waited for")
        self.read[member].append(tile)

    def release(self, tile):
        if self.holds[tile % STAGES] != tile:
            raise LostError("the stage was overwritten")
        self.empty[tile % STAGES].arrive()

    def consumer(self, member):
        first = 0
        for group in self.groups:
            previous = None
            for i, members in enumerate(group):
                if not members >> member & 1:
                    continue
                number = first + i
                if previous is not None and number - previous > self.near:
                    yield from self.reach(member, 2 * previous + 1)
                    self.release(2 * previous + 1)
                    previous = None
                yield from self.reach(member, 2 * number)
                if previous is None:
                    self.release(2 * number)
                else:
                    yield from self.reach(member, 2 * previous + 1)
                    self.release(2 * number)
                    self.release(2 * previous + 1)
                previous = number
            if previous is not None:
                yield from self.reach(member, 2 * previous + 1)
                self.release(2 * previous + 1)
            first += len(group)

    def play(self, seed):
        random.seed(seed)
        # Some are slow, so that others get far ahead.
        agents = [self.producer(), self.copies(), *map(self.consumer, range(MEMBERS))]
        weights = [random.choice([1, 1, 20]) for _ in agents]
        waits = [next(agent, None) for agent in agents]
        while any(waits):
            ready = [i for i, wait in enumerate(waits) if wait and wait()]
            if not ready:
                raise LostError("all wait")
            i = random.choices(ready, [weights[i] for i in ready])[0]
            waits[i] = next(agents[i], None)
        return self


def tiles_of(groups, member):
    entries = [members for group in groups for members in group]
    return [2 * n + part for n, e in enumerate(entries) if e >> member & 1 for part in range(2)]


GROUPS = st.lists(st.lists(st.integers(1, 7), max_size=30), min_size=1, max_size=4)
FAR = [[1] * 20 + [2] * 30 + [1, 4] + [2] * 9 + [7], [4] * 25 + [1, 2, 3]]
SEEDS = range(60)


@given(GROUPS, st.integers(0, 2**20))
def test_consumers_read_what_they_see_once(groups, seed):
    game = Game(groups).play(seed)
    for member in range(MEMBERS):
        assert sorted(game.read[member]) == tiles_of(groups, member)


@pytest.mark.parametrize("seed", SEEDS)
def test_consumers_that_have_little_to_do(seed):
    game = Game(FAR).play(seed)
    assert [sorted(read) for read in game.read] == [tiles_of(FAR, m) for m in range(MEMBERS)]


def lost(**rules):
    reasons = []
    for seed in SEEDS:
        try:
            Game(FAR, **rules).play(seed)
        except LostError as error:
            reasons.append(str(error))
    return reasons


def test_the_game_is_lost_without_a_look_at_what_has_begun():
    assert set(lost(looks=False)) & {"not the tile that was waited for", "too many arrivals"}


def test_the_game_is_lost_if_values_are_kept_for_far_keys():
    assert "all wait" in lost(near=100)
