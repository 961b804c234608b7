"""Writes the measured numbers into README.md: python -m benchmarks.readme [--check]

The newest results file of each kind of device becomes a table between the markers. Each cell is
the rate over visible pairs, and the speed relative to the fastest peer of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.names import MATMUL
from benchmarks.report import by_op, load, number, unit

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- measured numbers: written by python -m benchmarks.readme -->"
END = "<!-- end of measured numbers -->"
NONE_YET = "No results file yet; `python -m benchmarks` writes one."
PEER_NAMES = {
    "fa3": "FlashAttention-3",
    "cudnn": "cuDNN",
    "flash2": "FlashAttention-2",
    "flex": "FlexAttention",
    "torch": "torch",
}


def newest(folder: Path) -> list[dict]:
    """The last results of each type of device, GPUs first."""
    latest: dict[str, dict] = {}
    for path in sorted(folder.glob("*.json")):
        results = load(path)
        kind = results["device"]["type"]
        if kind not in latest or latest[kind]["timestamp"] < results["timestamp"]:
            latest[kind] = results
    return [latest[kind] for kind in sorted(latest, reverse=True)]


def cell(case: dict, l2: str, scale: float) -> str:
    ours, *others = by_op(case, l2).values()
    text = number(ours["useful_tflops"] * scale)
    if others:
        peer = min(others, key=lambda r: r["ms"]["median"])
        ratio = peer["ms"]["median"] / ours["ms"]["median"]
        text += f", {ratio:.2f}x {PEER_NAMES.get(peer['op'], peer['op'])}"
    return text


def row_name(case: dict) -> str:
    s = case["shape"]
    mask = "causal" if s["causal"] else "full"
    if s["window"]:
        mask = "window " + "x".join(map(str, s["window"]))
    heads = str(s["heads_q"])
    if s["heads_q"] != s["heads_kv"]:
        heads += f"/{s['heads_kv']}"
    return f"D={s['head_dim']}, {heads} heads, {mask}, {s['dtype']}"


def caption(results: dict) -> str:
    name, scale = unit(results)
    device = results["device"]
    where = device["name"]
    if "threads" in device:
        where += f" ({device['threads']} threads)"
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["dirty"] else "")
    dtype = results["cases"][0]["shape"]["dtype"]
    matmul = statistics.median(
        run["useful_tflops"] * scale
        for case in results["cases"]
        for run in case["runs"]
        if run["op"] == MATMUL and case["shape"]["dtype"] == dtype
    )
    settings = results["settings"]
    return (
        f"{where}, torch {results['versions']['torch']}, {results['timestamp'][:10]}, commit "
        f"{commit}. {name} over the visible pairs, median of {settings['iterations']}, "
        f"{settings['l2'][0]} cache; and the speed relative to the fastest other kernel in the "
        f"same run. A {dtype} matrix product ran at {number(matmul)} {name}."
    )


def table(results: dict) -> str:
    _, scale = unit(results)
    l2 = results["settings"]["l2"][0]
    columns: dict[str, int] = {}
    rows: dict[str, dict[str, str]] = {}
    for case in results["cases"]:
        size = case["name"].rsplit("/", 1)[1]
        columns[size] = case["shape"]["length"]
        rows.setdefault(row_name(case), {})[size] = cell(case, l2, scale)
    sizes = sorted(columns, key=columns.__getitem__)
    lines = [caption(results), ""]
    lines.append("| length | " + " | ".join(sizes) + " |")
    lines.append("| --- |" + " --- |" * len(sizes))
    for row, cells in rows.items():
        lines.append(f"| {row} | " + " | ".join(cells.get(size, "") for size in sizes) + " |")
    return "\n".join(lines)


def section(folder: Path) -> str:
    tables = [table(results) for results in newest(folder)]
    return "\n\n".join(tables) or NONE_YET


def rewrite(text: str, body: str) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the readme has no line '{BEGIN}' followed by '{END}'")
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    p.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md")
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = p.parse_args(argv)
    old = args.readme.read_text()
    new = rewrite(old, section(args.results))
    if args.check:
        if old != new:
            print(f"{args.readme} is out of date: run python -m benchmarks.readme", file=sys.stderr)
        return int(old != new)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
