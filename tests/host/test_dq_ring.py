"""The hand-over of stages in the kernel for the gradient of q, as the game of test_list_ring.py.

Here a consumer keeps the keys of a tile until their third product, which it gives to the matrix
unit before it waits for the next tile. Where the stage of that one could be the same, or could
depend on it, it has to finish first. The rules that are copied are backward/dq/accumulation.h's,
and of forward/producer.h those where keys are not ahead.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import stage_game
from hypothesis import given
from hypothesis import strategies as st
from stage_game import Ring, State, enter, holds, producer, read, release, slot, wait

import kernel_list

_C = pytest.importorskip("sparse_fmha._C")

INCLUDE = Path(__file__).resolve().parents[2] / "include" / "sparse_fmha" / "sm90"
STAGES = (1, 2, 3)


class Tile(NamedTuple):
    """What each of two consumers computes of a query tile's stages."""

    loaded: int
    steps: list  # of each consumer: (stage, whether one of the other's alone lies before it)
    passed: tuple = (0, 0)  # stages that it passes over first


def streams(stages):
    return Tile(sum(stages), [_C.consumer_places(stages, who) for who in range(2)])


def suffixes(loaded, first, second):
    passed = (min(first, loaded), min(second, loaded))
    return Tile(loaded, [[(i, False) for i in range(n, loaded)] for n in passed], passed)


def needed(by):
    """by: for each stage two bits, who needs it."""
    return Tile(
        len(by), [[(i, False) for i, bits in enumerate(by) if bits >> who & 1] for who in range(2)]
    )


def one_lane(k, v, tiles, flights):
    at = State(len(k.full))
    for tile, work in enumerate(tiles):
        for i in range(work.loaded):
            k.published[slot(at)] = v.published[slot(at)] = (tile, i)
            for ring in (k, v):
                yield lambda ring=ring, at=at: ring.empty[at.index].passed(at.phase ^ 1)
                ring.content[at.index] = "in flight"
                flights.append((ring, at.index, (tile, i), lambda full: full.land(1)))
                ring.full[at.index].arrive(expect=1)
            at = at.plus(1)


def gatherer(rings, tiles, flights):
    at = State(len(rings[0].full))
    for tile, work in enumerate(tiles):
        for i in range(work.loaded):
            for ring in rings:
                yield lambda ring=ring, at=at: ring.empty[at.index].passed(at.phase ^ 1)
                ring.content[at.index] = "in flight"
                flights.append((ring, at.index, (tile, i), lambda full: full.arrive()))
            at = at.plus(1)


class Consumer:
    def __init__(self, k, v, tiles, who, asks, has_streams, careless=False):
        self.k, self.v, self.tiles, self.who = k, v, tiles, who
        self.asks = asks  # of each stage whether it needs it
        stages = len(k.full)
        self.overlaps = stages > 1
        self.others_wait = self.overlaps and has_streams and stages == 2 and not careless
        self.state = State(stages)
        self.at_hand = None  # the stage whose gradients have not met its keys

    def finish(self):
        yield lambda: True
        holds(self.k, self.state, self.at_hand)
        release(self.k, self.state)
        self.at_hand = None

    def step(self, what, follows_other):
        following, previous = self.at_hand, self.state
        self.state = self.state.plus(2 if follows_other else 1)
        yield from enter(self.k, self.state, follows_other)
        yield from read(self.k, self.state, what)
        if following:
            holds(self.k, previous, following)
            release(self.k, previous)
        yield from enter(self.v, self.state, follows_other)
        yield from read(self.v, self.state, what)
        release(self.v, self.state)
        self.at_hand = what
        if not self.overlaps:
            yield from self.finish()

    def pass_over(self):
        for ring in (self.k, self.v):
            yield from wait(ring, self.state)
            release(ring, self.state)
        self.state = self.state.plus(1)

    def run(self):
        for tile, work in enumerate(self.tiles):
            end = self.state.count + work.loaded
            steps = work.steps[self.who]
            for _ in range(work.passed[self.who]):
                yield from self.pass_over()
            self.state = self.state.plus(-1)
            if self.asks:
                yield from self.ask(tile, work.loaded, {stage for stage, _ in steps})
            else:
                for stage, follows_other in steps:
                    if self.at_hand and self.others_wait and follows_other:
                        yield from self.finish()
                    yield from self.step((tile, stage), follows_other)
            if self.at_hand:
                yield from self.finish()
            self.state = self.state.plus(1)
            while self.state.count < end:
                yield from self.pass_over()
            assert self.state.count == end

    def ask(self, tile, loaded, own):
        for stage in range(loaded):
            following = self.state.plus(1)
            yield from wait(self.k, following)
            if stage in own:
                yield from self.step((tile, stage), False)
                continue
            if self.at_hand:
                yield from self.finish()
            release(self.k, following)
            yield from wait(self.v, following)
            release(self.v, following)
            self.state = following


def play(tiles, stages, seed, kind, careless=False):
    """kind: of tiles, and who fills the stages."""
    flights = []
    gathers = kind.startswith("gathered")
    k, v = Ring(stages, 1 + gathers), Ring(stages, 1 + gathers)
    of_lists = kind == "lists" or gathers
    if of_lists:
        counts = [(work.loaded,) for work in tiles]
        actors = [producer(ring, counts, flights, gathers) for ring in (k, v)]
        if kind == "gathered":
            actors.append(gatherer([k, v], tiles, flights))
        elif kind == "gathered apart":
            actors += [gatherer([ring], tiles, flights) for ring in (k, v)]
    else:
        actors = [one_lane(k, v, tiles, flights)]
    actors += [
        Consumer(k, v, tiles, who, kind == "needed", of_lists, careless).run() for who in range(2)
    ]
    stage_game.play(actors, flights, seed)


few = st.integers(0, 9)
TILES = {
    "lists": st.builds(streams, st.tuples(st.integers(0, 5), few, few)),
    "suffixes": st.builds(suffixes, few, few, few),
    "needed": st.builds(needed, st.lists(st.integers(0, 3), max_size=9)),
}
TILES["gathered"] = TILES["gathered apart"] = TILES["lists"]


@pytest.mark.parametrize("kind", TILES)
@given(st.data(), st.sampled_from(STAGES), st.integers(0, 1 << 30))
def test_stages_go_round(kind, data, stages, seed):
    tiles = data.draw(st.lists(TILES[kind], max_size=6))
    for s in range(5):
        play(tiles, stages, seed + s, kind)


def test_keys_that_are_kept_over_a_stage_of_another_stop_everything():
    """The game would tell: with two stages the next one is where the kept one is."""
    with pytest.raises(AssertionError, match="nobody can go on"):
        play([streams((0, 3, 3))], 2, 0, "lists", careless=True)


def test_rings_of_the_kernels_are_played():
    rows = [row for row in kernel_list.read_all() if row.direction == "backward_dq"]
    stages = {row.stages for row in rows if row.arch.family == "sm90"}
    assert stages
    assert stages <= set(STAGES)


# What plays it here, the file below include/sparse_fmha/sm90, and code without comments and spaces.
RULES = [
    (
        "one_lane", "forward/producer.h",
        """smem.ring_k.acquire(state);
           if (leads) {
             geometry.publish(box, state);
             smem.ring_k.expect(state, Traits::kBytesK);
             geometry.load_k(smem.ring_k.full[state.index], keys_of(state), source);
           }
           smem.ring_v.acquire(state);""",
    ),
    (
        "gatherer", "forward/producer.h",
        """if constexpr (kKeys) {
             smem.ring_k.acquire(state);
             rows.gather_k(key, keys_of(state), smem.ring_k.full[state.index]);
           }
           if constexpr (kValues) { smem.ring_v.acquire(state);""",
    ),
    (
        "Consumer", "backward/dq/accumulation.h",
        """kOverlaps = Traits::kStages > 1;
           static constexpr bool kOthersWait =
               kOverlaps && kHasStreams<Geometry> && Traits::kStages == 2;""",
    ),
    (
        "Consumer.finish", "backward/dq/accumulation.h",
        """warpgroup_wait<0>();
           warpgroup_fence_operand(output);
           smem.ring_k.release(state);""",
    ),
    (
        "Consumer.step", "backward/dq/accumulation.h",
        """state.advance();
           stages.enter(walk, i);
           stages.wait(smem.ring_k, walk, i, state);""",
    ),
    (
        "Consumer.step", "backward/dq/accumulation.h",
        """smem.ring_k.release(previous);
           }
           stages.wait(smem.ring_v, walk, i, state);""",
    ),
    (
        "Consumer.run", "backward/dq/accumulation.h",
        "if (walk.follows_other(i)) { finish_gradient(); step(i, masked, kNo); return; }",
    ),
    (
        "Consumer.ask", "backward/dq/accumulation.h",
        """if (follows) { finish_gradient(); follows = false; }
           smem.ring_k.release(next);
           smem.ring_v.wait(next);
           smem.ring_v.release(next);
           state = next;""",
    ),
]  # fmt: skip


def code(text):
    return re.sub(r"\s", "", re.sub(r"//.*", "", text))


@pytest.mark.parametrize(("game", "file", "rule"), RULES)
def test_the_kernel_has_the_rules_of_the_game(game, file, rule):
    found = code(rule) in code((INCLUDE / file).read_text())
    assert found, f"{file} has changed: does {game} still play it?"
