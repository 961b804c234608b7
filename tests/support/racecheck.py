"""Which reports of compute-sanitizer's racecheck are known; any other is an error.

    compute-sanitizer --tool racecheck ... > racecheck.log
    python tests/support/racecheck.py racecheck.log

docs/profiling.md says why the known ones are no races. A site is a function of a source file: lines
move, and a report's line is looked up in the source beside this file, which has to be that of the
build. Without line numbers (-lineinfo) no report is known.

Understood are the forms of CUDA 12 and 13, of --racecheck-report analysis ("Race reported between")
and hazard ("Potential WAR hazard"). Only the second names the kind of the hazard; a read before the
write that it waits for, at two known sites, passes in the first.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

INCLUDE = Path(__file__).resolve().parents[2] / "include" / "sparse_fmha"


@dataclass(frozen=True)
class Site:
    """A function of a file below include/sparse_fmha; without one, any line of another's file."""

    file: str
    function: str | None = None

    def has(self, file: str, line: int) -> bool:
        """Whether a reported place is in it; the sanitizer names the whole path or the file."""
        ours, theirs = Path(self.file).parts[::-1], Path(file).parts[::-1]
        if any(a != b for a, b in zip(ours, theirs, strict=False)):
            return False
        return self.function is None or any(line in lines for lines in self.lines())

    def lines(self) -> list[range]:
        """Those of each definition, from its name to its last brace."""
        text = (INCLUDE / self.file).read_text()
        found = []
        for match in re.finditer(rf"\b{self.function}(?=\()", text):
            header = _closing(text, match.end(), "()")
            body = re.compile(r"[\s\w]*(?=\{)").match(text, header)
            if body:
                first, last = match.start(), _closing(text, body.end(), "{}")
                found.append(range(text.count("\n", 0, first) + 1, text.count("\n", 0, last) + 2))
        return found


def _closing(text: str, at: int, pair: str) -> int:
    """The place behind the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i + 1
    raise ValueError(f"no {pair[1]} closes the {pair[0]} at {at}")


@dataclass(frozen=True)
class Known:
    """Consumers read at one of `reads` what a producer writes at one of `writes` afterwards."""

    name: str
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]


GRID = "sm90/geometry/grid/grid.h"
WINDOWS = "sm90/geometry/grid/window_mask.h"
LISTS = "sm90/geometry/lists/lists.h"
LIST_KEYS = "sm90/geometry/lists/keys.h"
STRIPES = "sm90/geometry/stripes/stripes.h"
DECODE = "sm90/decode/storage.h"
DECODE_MASK = "device/decode/tile_mask.h"
KNOWN = (
    Known("neighborhood: who needs a box", (Site(GRID, "needs"),), (Site(GRID, "publish"),)),
    Known(
        "neighborhood: masks of windows", (Site(WINDOWS, "look_up"),), (Site(WINDOWS, "publish"),)
    ),
    Known(
        "block lists: boxes and bitmasks of a stage",
        # What look_up calls, and the copy that copy_bits starts, stand in other files.
        (
            Site(LISTS, "look_up"),
            Site("planning/list_stages.h", "seen_columns"),
            Site("planning/list_stages.h", "first_columns"),
            Site("device/bit_mask.h", "set"),  # what it is handed is read there
        ),
        (
            Site(LISTS, "publish"),
            Site(LISTS, "copy_bits"),
            Site("cute/arch/copy_sm90_tma.hpp"),
        ),
    ),
    Known(
        "block lists of dK and dV: masks of a stage",
        (Site(LIST_KEYS, "use"), Site(LIST_KEYS, "look_up")),
        (Site(LIST_KEYS, "publish_mask"),),
    ),
    Known("stripes: keys of a stage", (Site(STRIPES, "look_up"),), (Site(STRIPES, "publish"),)),
    Known(
        "decode: the mask of a stage",
        (
            Site(DECODE, "is_masked"),
            Site(DECODE_MASK, "hides_row"),
            Site(DECODE_MASK, "hide"),
            Site(DECODE_MASK, "tree_bits"),
        ),
        (Site(DECODE, "set_masked"), Site(DECODE, "set_position")),
    ),
)

ANALYSIS = re.compile(r"Race reported between (Read|Write) access at (.*)")
SECOND = re.compile(r"and (Read|Write) access at (.*)")
HAZARD = re.compile(r"Potential (\w+) hazard detected")
THREAD = re.compile(r"(Read|Write) Thread \(.*?\) at (.*)")
PLACE = re.compile(r" in (\S+?):(\d+)(?=$|:|\s+\[)")  # file:line, and an older one's function
SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed")
OTHERS = re.compile(r"(\w+ )*(error|warning|fatal)|program hit|.*not printed", re.IGNORECASE)


@dataclass
class Report:
    """Accesses as (Read or Write, where); the first is reported against each of the others."""

    lines: list[str]
    accesses: list[tuple[str, str]]
    kind: str = "WAR"  # where it is not named, as the known ones are

    def known(self) -> str | None:
        """The name of what it is known as."""
        names = {_known(self.accesses[0], other) for other in self.accesses[1:]}
        return None if None in names or self.kind != "WAR" else ", ".join(sorted(names))


def _known(*accesses: tuple[str, str]) -> str | None:
    places = {kind: PLACE.search(where) for kind, where in accesses}
    if set(places) != {"Read", "Write"} or None in places.values():
        return None
    read, write = ((places[kind][1], int(places[kind][2])) for kind in ("Read", "Write"))
    for known in KNOWN:
        if any(s.has(*read) for s in known.reads) and any(s.has(*write) for s in known.writes):
            return known.name
    return None


def reports(output: str) -> list[Report]:
    """All of them, in what compute-sanitizer printed.

    Raises:
        ValueError: the output says something else, or not as many as its summary.
    """
    found: list[Report] = []
    counts = []
    for line in output.splitlines():
        if not line.startswith("====="):
            continue  # of the program
        text = line.lstrip("=").strip()
        analysis, second = ANALYSIS.search(text), SECOND.match(text)
        hazard, thread = HAZARD.search(text), THREAD.match(text)
        if analysis or hazard:
            found.append(Report([], [analysis.groups()] if analysis else []))
            found[-1].kind = hazard[1] if hazard else "WAR"
        elif second or thread:
            if not found:
                raise ValueError(f"part of no report: {line}")
            found[-1].accesses.append((second or thread).groups())
        elif SUMMARY.match(text):
            counts.append(int(SUMMARY.match(text)[1]))
            continue
        elif OTHERS.match(text):
            raise ValueError(f"no report of a race: {line}")
        else:
            continue
        found[-1].lines.append(line)
    if not counts:
        raise ValueError("there is no RACECHECK SUMMARY")
    if sum(counts) != len(found):
        raise ValueError(
            f"the summary counts {sum(counts)} reports, of which {len(found)} are here"
        )
    if any(len(report.accesses) < 2 for report in found):
        raise ValueError("a report has less than two accesses")
    return found


def main(argv: list[str]) -> int:
    (log,) = argv
    unknown, seen = [], {}
    for report in reports(Path(log).read_text(errors="replace")):
        name = report.known()
        if name is None:
            unknown.append(report)
        else:
            seen[name] = seen.get(name, 0) + 1
    for name, count in seen.items():
        print(f"{count} known: {name}")
    for report in unknown:
        print("unknown:", *report.lines, sep="\n")
    print(f"{len(unknown)} unknown reports")
    return int(bool(unknown))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
