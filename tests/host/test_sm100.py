"""What a tcgen05 kernel needs and a host can prove: descriptors, tensor memory, barriers.

The headers of include/sparse_fmha/sm100 are compiled by the host's compiler; see tests/host/sm100.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from host_programs import compiled, cuda_headers, cutlass_headers, lines

SOURCES = Path(__file__).with_name("sm100")
ROLES = ["load", "mma", "softmax 0", "softmax 1", "correction", "epilogue"]
BARRIERS = [
    *("queries full", "queries empty", "slot full", "slot empty", "scores full", "weights full"),
    *("factor full", "factor empty", "output ready", "output full", "stage full", "stage empty"),
]
BY_COPIES = {"queries full", "slot full"}  # no role arrives at these


def program(folder: Path, name: str, *flags: str) -> Path:
    return compiled(folder / name, [SOURCES / f"{name}.cpp"], *flags)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    return program(tmp_path_factory.mktemp("sm100"), "protocol", "-O2", "-Wall", "-Wextra")


def test_every_interleaving_is_right(protocol):
    cases = [line.split(maxsplit=6) for line in lines(protocol, "check")]
    assert [case for case in cases if case[6] != "right"] == []
    seen = {tuple(map(int, case[:5])) for case in cases}
    for tiles in range(7):
        assert {(q, slots, tiles, 0, 0) for q in (1, 2) for slots in (2, 3, 4)} <= seen
        assert {(2, 2, tiles, passed, 0) for passed in range(1, tiles + 1)} <= seen
        assert {(2, 3, tiles, 0, passed) for passed in range(1, tiles + 1)} <= seen
    states = {tuple(map(int, case[:5])): int(case[5]) for case in cases}
    assert all(states[2, 2, n, 0, 0] > 100 * n for n in range(7)), "few orders were visited"


def test_each_wait_and_each_arrival_is_needed(protocol):
    found = {}
    for line in lines(protocol, "mutations"):
        what, _, fault = line.partition(": ")
        role, barrier, kind = what.split(maxsplit=2)
        found[ROLES[int(role)], BARRIERS[int(barrier)], kind] = fault
    assert [what for what, fault in found.items() if fault == "right"] == []
    for barrier in BARRIERS:
        kinds = {kind for _, of, kind in found if of == barrier}
        assert kinds == (
            {"no wait"} if barrier in BY_COPIES else {"no wait", "no arrival", "early"}
        )
    assert {role for role, _, _ in found} == set(ROLES)
    for (_, _, kind), fault in found.items():
        assert fault.startswith("deadlock") == (kind == "no arrival"), (kind, fault)


def test_columns_that_overlap_are_noticed(protocol):
    found = dict(line.split(": ", maxsplit=1) for line in lines(protocol, "overlap"))
    right = {what for what, fault in found.items() if fault == "right"}
    assert right == {"none", "weights in the lower half of the scores"}
    assert len(found) == 6


def test_the_plan_of_tensor_memory(tmp_path):
    output = lines(program(tmp_path, "tmem"))
    scores, weights, result = range(3)
    live = [tuple(map(int, line.split()[1:])) for line in output if line.startswith("live")]
    # Weights may lie in scores, and nothing in what lives from the first key tile to the last.
    assert live == [(scores, result), (weights, result)]
    plans = [list(map(int, line.split())) for line in output if not line.startswith("live")]
    assert [plan[0] for plan in plans] == list(range(16, 257, 16))
    for head_dim, allocated, *numbers in plans:
        assert len(numbers) == (12 if head_dim <= 128 else 6), "query tiles"
        columns = [
            set(range(first, first + count))
            for first, count in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        assert max(max(of) for of in columns) < allocated <= 512
        assert allocated & (allocated - 1) == 0
        for tile in range(len(columns) // 3):
            of = columns[3 * tile : 3 * tile + 3]
            assert list(map(len, of)) == [128, 64, head_dim]
            assert of[weights] <= of[scores]
        # The tiles of a block are live at once; within one, see above.
        for (i, a), (j, b) in itertools.combinations(enumerate(columns), 2):
            one = i // 3 == j // 3
            assert (one and (i % 3, j % 3) not in live) or not a & b, (head_dim, i, j)


def test_descriptors_are_cutlass_own(tmp_path):
    cutlass, cuda = cutlass_headers(), cuda_headers()
    where = [flag for path in (cutlass, cuda, cuda / "cccl") for flag in ("-isystem", str(path))]
    found = lines(program(tmp_path, "descriptors", "-DNDEBUG", "-w", *where))
    # Elements of 2 widths of keys x 3 head dims x 2 dtypes x 4 addresses, twice, and more.
    assert int(found[0]) > 2 * 2 * 4 * (64 + 128) * (64 + 128 + 256)
