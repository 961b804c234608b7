"""Every cell in which another library ran the same problem, the slowest of ours first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.harness.names import OURS
from benchmarks.tables import backward, decode, small
from benchmarks.tables.markdown import lines_of, source
from benchmarks.tables.rates import PEER_NAMES, best_peer, by_op

TITLE = "All cells beside the fastest other kernel"
COLUMNS = ("case", "ms", "fastest other", "its ms", "speed relative to it")


@dataclass(frozen=True)
class Cell:
    case: str
    ms: float
    peer: str
    peer_ms: float
    same_work: bool  # False where ours leaves pairs out that the other computes

    @property
    def ratio(self) -> float:
        return self.peer_ms / self.ms

    def line(self) -> dict[str, str]:
        ratio = f"{self.ratio:.3f}x"
        shown = ratio if self.ratio >= 1 else f"**{ratio}**"
        case = self.case if self.same_work else f"{self.case} *"
        values = (case, f"{self.ms:.3g}", self.peer, f"{self.peer_ms:.3g}", shown)
        return dict(zip(COLUMNS, values, strict=True))


def of_cases(results: dict) -> Iterator[Cell]:
    """Of a run of `python -m benchmarks`."""
    for case in results["cases"]:
        runs = by_op(case, results["settings"]["l2"][0])
        if peer := best_peer(runs):
            skips = bool(case["shape"].get("skip"))
            yield Cell(case["name"], runs[OURS]["ms"]["median"], *peer, not skips)


def of_small(results: dict) -> Iterator[Cell]:
    for row in results["rows"]:
        if peer := small.best_peer(row):
            op, ms = peer
            yield Cell(row["case"], row["ms"][OURS]["median"], PEER_NAMES.get(op, op), ms, True)


def of_decode(results: dict) -> Iterator[Cell]:
    for case, ops in decode.by_case(results["rows"]).items():
        ours, peer = decode.ours_of(ops), decode.best_peer(ops)
        if ours and peer:
            library, comma, how = peer["op"].partition(", ")
            name = PEER_NAMES.get(library, library) + comma + how
            ms, other_ms = ours["ms"]["median"], peer["ms"]["median"]
            yield Cell(f"decode/{case}", ms, name, other_ms, ours["group"] not in decode.SPARSE)


def of_backward(results: dict) -> Iterator[Cell]:
    for case, ops in backward.by_case(results).items():
        peers = [(ops[peer]["ms"]["median"], peer) for peer in backward.PEERS if peer in ops]
        if peers:
            ms, name = min(peers)
            yield Cell(f"backward/{case}", ops[OURS]["ms"]["median"], name, ms, True)


STUDIES = {"small": of_small, "decode": of_decode, "backward": of_backward}


def mean(cells: list[Cell]) -> float:
    """Geometric."""
    return math.exp(sum(math.log(cell.ratio) for cell in cells) / len(cells))


def caption(cells: list[Cell], sources: list[str]) -> str:
    """Of cells in order."""
    worst = cells[0]
    same = [cell for cell in cells if cell.same_work]
    no_slower = sum(cell.ratio >= 1 for cell in cells)
    text = (
        "Each case of the tables below of which the same run has another library's time: forward, "
        "decode and backward. Worst first; bold: slower than the other kernel. Cases without such "
        "a time are left out, as are published times, whole models and methods, and the kernels "
        f"for other GPUs. {len(cells)} cells, {no_slower} at 1.00 or more, geometric mean "
        f"{mean(cells):.3f}x, worst {worst.ratio:.3f}x ({worst.case}). "
    )
    if same and len(same) < len(cells):
        no_slower = sum(cell.ratio >= 1 for cell in same)
        text += (
            f"*: ours leaves pairs out, the other computes all of them; without these {len(same)} "
            f"cells, {no_slower} at 1.00 or more, geometric mean {mean(same):.3f}x. "
        )
    return f"{text}{'; '.join(dict.fromkeys(sources))}."


def table(runs: list[dict], studies: dict[str, dict | None]) -> str | None:
    """Of the newest runs of cases on a GPU, and of studies by their folder; None without a cell."""
    cells, sources = [], []
    for read, results in [
        *((of_cases, run) for run in runs),
        *((read, studies.get(name)) for name, read in STUDIES.items()),
    ]:
        found = list(read(results)) if results else []
        cells += found
        sources += [source(results)] if found else []
    if not cells:
        return None
    cells.sort(key=lambda cell: cell.ratio)
    return lines_of(caption(cells, sources), COLUMNS, [cell.line() for cell in cells])
