"""The lines of the Hopper kernel that the game of test_list_ring.py was written after.

A change is no error of the kernel: look whether the game still plays it, then quote it anew.
"""

import re
from pathlib import Path

import pytest

INCLUDE = Path(__file__).resolve().parents[2] / "include" / "sparse_fmha"
# What plays it there, the file below include/sparse_fmha, and code without comments and spaces.
RULES = [
    ("Barrier.passed", "sm90/common/smem.h", "empty[s.index].wait(s.phase ^ 1);"),
    ("Barrier.passed", "sm90/common/smem.h", "full[s.index].wait(s.phase);"),
    ("Ring", "sm90/common/smem.h", "full[i].init(producers); empty[i].init(consumer_warps);"),
    (
        "Ring", "sm90/forward/kernel.h",
        "kProducers = 1 + (kGathers<Geometry> ? 32 * kGatherers : 0);",
    ),
    ("Ring", "sm90/forward/kernel.h", "smem.ring_v.init(Traits::kConsumerWarps, kProducers);"),
    (
        "Ring", "sm90/forward/kernel.h",
        "smem.ring_k.init(Traits::kConsumerWarps, kProducers + 32 * kMaskWarps<Geometry>);",
    ),
    ("State", "sm90/common/smem.h", "if (++index == Stages) { index = 0; phase ^= 1; }"),
    ("State", "sm90/common/smem.h", "if (--index < 0) { index = Stages - 1; phase ^= 1; }"),
    *(
        (game, f"sm90/geometry/{file}", rule)
        for file in ("lists/lists.h", "stripes/stripes.h")
        for game, rule in (
            ("Ring.published", "Stage stages[2 * Traits::kStages];"),
            ("slot", "return place.index + static_cast<int>(place.phase) * Traits::kStages;"),
        )
    ),
    (
        "producer", "sm90/forward/producer.h",
        """if constexpr (!kValues) {
             geometry.publish(box, state);
             publish_biases(work, box, state);
           }
           ring.acquire(state);
           if constexpr (!kValues) { bytes += geometry.copy_bits(box, state, full); }
           if (leads) { ring.expect(state, bytes); }""",
    ),
    (
        "gatherer", "sm90/forward/producer.h",
        """for (int i = 0; i <= rows.count; ++i) {
             auto key = previous_key;
             if (i < rows.count) {
               key = rows.next(i);
               smem.ring_k.acquire(state);
               rows.gather_k(key, keys_of(state), smem.ring_k.full[state.index]);
             }
             if (i > 0) {
               auto previous = state;
               previous.retreat();
               smem.ring_v.acquire(previous);""",
    ),
    ("consumer", "sm90/forward/stages.h", "if (walk.follows_other(i)) { state.advance(); }"),
    (
        "enter", "sm90/forward/stages.h",
        """if (walk.follows_other(i)) {
             auto passed = place;
             passed.retreat();
             ring.wait(passed);
             ring.release(passed);
           }
         }
         ring.wait(place);""",
    ),
    (
        "pass_over", "sm90/forward/stages.h",
        """smem.ring_k.wait(state);
           smem.ring_k.release(state);
           smem.ring_v.wait(state);
           smem.ring_v.release(state);
           state.advance();""",
    ),
]  # fmt: skip


def code(text):
    return re.sub(r"\s", "", re.sub(r"//.*", "", text))


@pytest.mark.parametrize(("game", "file", "rule"), RULES)
def test_the_kernel_has_the_rules_of_the_game(game, file, rule):
    found = code(rule) in code((INCLUDE / file).read_text())
    assert found, f"{file} has changed: does {game} still play it?"
