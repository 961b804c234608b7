"""The table that `python -m benchmarks` prints."""

from __future__ import annotations

from benchmarks.harness.names import DENSE, OURS
from benchmarks.harness.report import plain_table
from benchmarks.tables.rates import (
    by_op,
    number,
    percent_of_dense,
    predicted,
    share_of_dense,
    target,
    unit,
)


def table_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """One row for each case: ours, then each peer's rate and how much faster ours is."""
    name, scale = unit(results)
    first, *others = results["settings"]["l2"]
    peers = list(dict.fromkeys(op for c in results["cases"] for op in by_op(c, first)))[1:]
    header = ["case", "ms", "p10..p90", name, *others, "executed", "% matmul", "GB/s", "error"]
    sparse = any(c["shape"]["window"] or c["shape"].get("lists") for c in results["cases"])
    header += ["% dense", "predicted"] if sparse else []
    lists = any(case["shape"].get("lists") for case in results["cases"])
    header += [*(["% dense time", "target"] if lists else []), *peers, "error / best"]
    rows = []
    for case in results["cases"]:
        runs = by_op(case, first)
        ours, *rest = runs.values()
        ms = ours["ms"]
        row = [
            case["name"],
            f"{ms['median']:.3f}",
            f"{ms['p10']:.3f}..{ms['p90']:.3f}",
            number(ours["useful_tflops"] * scale),
            *(number(by_op(case, l2)[OURS]["useful_tflops"] * scale) for l2 in others),
            number(ours["executed_tflops"] * scale) if "executed_tflops" in ours else "",
            number(ours["percent_of_matmul"]),
            number(ours["gbps"]),
            f"{ours['error']['rel_rms']:.1e}",
        ]
        if sparse:
            percent, ratio = percent_of_dense(runs), predicted(ours)
            row.append("" if percent is None else number(percent))
            row.append("" if ratio is None else f"{ratio:.2f}x")
        if lists:
            share = share_of_dense(runs)
            row.append("" if share is None else f"{share:.3g}")
            row.append(target(case, results["cases"], first))
        for peer in peers:
            text = ""
            if peer in runs:
                ratio = runs[peer]["ms"]["median"] / ms["median"]
                text = f"{number(runs[peer]['useful_tflops'] * scale)} {ratio:.2f}x"
            row.append(text)
        same = [run for run in rest if not run["op"].endswith(DENSE)]
        best = min((run["error"]["rel_rms"] for run in same), default=0)
        row.append(f"{ours['error']['rel_rms'] / best:.2f}" if best else "")
        rows.append(row)
    return header, rows


def print_table(results: dict) -> None:
    header, rows = table_rows(results)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(header, rows))
    else:
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console = Console()
        if not console.is_terminal:  # a log file: no wrapping
            console = Console(width=250)
        console.print(table)
    for name, reason in sorted({x for c in results["cases"] for x in c["skipped"].items()}):
        print(f"not measured: {name}: {reason}")
    for name, error in results["failed"].items():
        print(f"failed: {name}: {error}")
