"""Writes the measured numbers into README.md: python -m benchmarks.tables.readme [--check]

Tables for each kind of device go between the markers, each from the newest results file that has
such cases: sequences, with the rate over visible pairs and the speed relative to the fastest peer
of the same run in each cell; and grids, block lists and skipping, a line for each case. Stripes
have results files of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.harness import report
from benchmarks.tables import blocks, diffusion, grids, scaling, sequences, skipping, stripes
from benchmarks.tables.markdown import lines_of, source
from sparse_fmha.cli import one_line_errors

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN = "<!-- measured numbers: written by python -m benchmarks.tables.readme -->"
END = "<!-- end of measured numbers -->"
NONE_YET = "No results file yet; `python -m benchmarks` writes one."


# By kind of case.
TABLES = {
    "sequence": sequences.table,
    "grid": grids.table,
    "blocks": blocks.table,
    "skip": skipping.table,
}

# Results of benchmarks of their own, by folder.
FOLDERS = {"stripes": stripes, "diffusion": diffusion, "scaling": scaling}


def kind(case: dict) -> str:
    """Which table a case is in."""
    shape = case["shape"]
    if shape.get("skip"):
        return "skip"
    return "blocks" if shape.get("lists") else "grid" if shape["window"] else "sequence"


def newest(folder: Path) -> dict[tuple[str, str], dict]:
    """By type of device and kind of case, the last results that have such cases, and those cases
    alone. GPUs are first; then the order is that of TABLES."""
    latest: dict[tuple[str, str], dict] = {}
    for results in sorted(map(report.load, folder.glob("*.json")), key=lambda r: r["timestamp"]):
        for one in TABLES:
            cases = [c for c in results["cases"] if kind(c) == one]
            if cases:
                latest[results["device"]["type"], one] = results | {"cases": cases}
    order = list(TABLES)
    return dict(sorted(latest.items(), key=lambda x: (x[0][0] != "cuda", order.index(x[0][1]))))


def section(folder: Path) -> str:
    tables = [TABLES[one](results) for (_, one), results in newest(folder).items()]
    for name, kind in FOLDERS.items():
        if results := report.newest(folder / name):
            caption = kind.caption(results, source(results))
            tables.append(lines_of(caption, kind.COLUMNS, kind.rows(results)))
    return "\n\n".join(tables) or NONE_YET


def rewrite(text: str, body: str) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the readme has no line '{BEGIN}' followed by '{END}'")
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.tables.readme", description=__doc__)
    p.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    p.add_argument("--readme", type=Path, default=README)
    p.add_argument("--results", type=Path, default=report.RESULTS)
    args = p.parse_args(argv)
    if not args.results.is_dir():
        raise ValueError(f"--results {args.results}: no such folder")
    old = args.readme.read_text()
    new = rewrite(old, section(args.results))
    if args.check:
        if old != new:
            print(
                f"{args.readme} is out of date: run python -m benchmarks.tables.readme",
                file=sys.stderr,
            )
        return int(old != new)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
