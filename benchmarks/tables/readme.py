"""Writes the measured numbers into README.md, docs/benchmarks.md and docs/choosing.md:
python -m benchmarks.tables.readme [--check]

README.md has a few headline rows, docs/benchmarks.md all tables, docs/choosing.md the fastest
methods by error, all between markers. Each table
is of the newest results file that has such cases, for each type of device: sequences, with the rate
over visible pairs and the speed relative to the fastest peer of the same run in each cell; grids,
block lists and skipping, a line for each case. Studies have results files in folders of their own.
The first table has all cells of these that have a peer, worst first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import report
from benchmarks.tables import (
    backward,
    blocks,
    builders,
    decode,
    dilation,
    frontier,
    grids,
    headline,
    host_time,
    key_bias,
    methods,
    models,
    other_gpus,
    other_gpus_decode,
    peers,
    query_rows,
    scaling,
    score_sums,
    sequences,
    serving,
    skip_training,
    skipping,
    skipping_gradients,
    small,
    stripes,
    vision,
)
from benchmarks.tables.markdown import lines_of, source
from sparse_fmha.cli import one_line_errors

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- measured numbers: written by python -m benchmarks.tables.readme -->"
END = "<!-- end of measured numbers -->"
NONE_YET = "No results file yet; `python -m benchmarks` writes one."


# By kind of case: a heading and what makes the table.
TABLES = {
    "sequence": ("Dense and causal attention", sequences.table),
    "grid": ("Neighborhood attention", grids.table),
    "blocks": ("Block-sparse attention", blocks.table),
    "skip": ("Skipping", skipping.table),
}

# Results of benchmarks of their own, by folder.
FOLDERS = {
    "small": small,
    "decode": decode,
    "serving": serving,
    "stripes": stripes,
    "dilation": dilation,
    "backward": backward,
    "skipping_gradients": skipping_gradients,
    "skip_training": skip_training,
    "key_bias": key_bias,
    "query_rows": query_rows,
    "score_sums": score_sums,
    "methods": methods,
    "frontier": frontier,
    "frontier_trained": frontier.TRAINED,
    "models": models,
    "vision": vision,
    "scaling": scaling,
    "other_gpus": other_gpus,
    "other_gpus_decode": other_gpus_decode,
    "host_time": host_time,
    "builders": builders,
}


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


def on_gpu(folder: Path) -> dict[str, dict]:
    """By kind of case."""
    return {one: found for (device, one), found in newest(folder).items() if device == "cuda"}


def sections(folder: Path) -> Iterator[str]:
    """Every table with its heading."""
    studies = {name: report.newest(folder / name) for name in peers.STUDIES}
    if all_cells := peers.table(list(on_gpu(folder).values()), studies):
        yield f"## {peers.TITLE}\n\n{all_cells}"
    for (device, one), results in newest(folder).items():
        title, table = TABLES[one]
        yield f"## {title}{'' if device == 'cuda' else f', {device}'}\n\n{table(results)}"
    for name, study in FOLDERS.items():
        if results := report.newest(folder / name, study.DEVICE):
            caption = study.caption(results, source(results))
            yield f"## {study.TITLE}\n\n{lines_of(caption, study.COLUMNS, study.rows(results))}"


def section(folder: Path) -> str:
    return "\n\n".join(sections(folder)) or NONE_YET


def headlines(folder: Path) -> str:
    return headline.table(on_gpu(folder), report.newest(folder / "models")) or NONE_YET


def choices(folder: Path) -> str:
    """The fastest methods of each run of the frontier."""
    runs = [report.newest(folder / name) for name in ("frontier", "frontier_trained")]
    tables = []
    for results in filter(None, runs):
        s = results["settings"]
        inputs = f"{s.get('inputs', 'planted').capitalize()} inputs, {s['length']} tokens. "
        caption = inputs + source(results) + "."
        tables.append(lines_of(caption, frontier.BEST, frontier.best(results)))
    return "\n\n".join(tables) or NONE_YET


def rewrite(path: Path, text: str, body: str) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no line '{BEGIN}' followed by '{END}'")
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.tables.readme", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md")
    p.add_argument("--tables", type=Path, default=ROOT / "docs" / "benchmarks.md")
    p.add_argument("--choosing", type=Path, default=ROOT / "docs" / "choosing.md")
    p.add_argument("--results", type=Path, default=report.RESULTS)
    args = p.parse_args(argv)
    if not args.results.is_dir():
        raise ValueError(f"--results {args.results}: no such folder")
    bodies = {
        args.readme: headlines(args.results),
        args.tables: section(args.results),
        args.choosing: choices(args.results),
    }
    old = {path: path.read_text() for path in bodies}
    new = {path: rewrite(path, old[path], body) for path, body in bodies.items()}
    stale = [path for path in bodies if old[path] != new[path]]
    if args.check:
        for path in stale:
            print(f"{path} is out of date: run python -m benchmarks.tables.readme", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(new[path])
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
