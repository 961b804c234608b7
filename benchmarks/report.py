"""The results file, and the table that is shown of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.names import MATMUL, OURS

SCHEMA = 1


def file_name(results: dict) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", results["device"]["name"].lower()).strip("-")
    stamp = re.sub(r"[-:]", "", results["timestamp"])[:13].replace("T", "-")
    return f"{stamp}-{device[:40].strip('-')}.json"


def save(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def load(path: Path) -> dict:
    results = json.loads(path.read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {results.get('schema')}, and {SCHEMA} is what is read")
    return results


def rate(tflops: float) -> str:
    return f"{tflops:.0f} TF/s" if tflops >= 10 else f"{1000 * tflops:.1f} GF/s"


def table_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    header = ["case", "L2", "op", "ms", "p10..p90", "useful", "executed", "GB/s", "% matmul",
              "rel. error", "ours is"]  # fmt: skip
    rows = []
    for case in results["cases"]:
        ours = {r["l2"]: r["ms"]["median"] for r in case["runs"] if r["op"] == OURS}
        for run in case["runs"]:
            if run["op"] == MATMUL:
                continue
            ms = run["ms"]
            executed = run.get("executed_tflops")
            rows.append([
                case["name"], run["l2"], run["op"], f"{ms['median']:.3f}",
                f"{ms['p10']:.3f}..{ms['p90']:.3f}", rate(run["useful_tflops"]),
                rate(executed) if executed else "", f"{run['gbps']:.3g}",
                f"{run['percent_of_matmul']:.0f}", f"{run['error']['rel_rms']:.1e}",
                "" if run["op"] == OURS else f"{ms['median'] / ours[run['l2']]:.2f}x",
            ])  # fmt: skip
    return header, rows


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    return "\n".join(form.format(*row).rstrip() for row in [header, *rows])


def print_table(results: dict) -> None:
    header, rows = table_rows(results)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(header, rows))
    else:
        table = Table(*header, box=None, pad_edge=False)
        previous = None
        for row in rows:
            same = row[0] == previous
            previous = row[0]
            style = "bold" if row[2] == OURS else None
            table.add_row("" if same else row[0], *row[1:], style=style)
        console = Console()
        if not console.is_terminal:  # a log file: no wrapping
            console = Console(width=160)
        console.print(table)
    for name, reason in sorted({x for c in results["cases"] for x in c["skipped"].items()}):
        print(f"not measured: {name}: {reason}")
