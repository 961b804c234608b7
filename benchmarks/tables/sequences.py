"""The table of the cases on sequences: in each cell the rate over visible pairs, and the
speed relative to the fastest peer of the same run."""

from __future__ import annotations

import statistics

from benchmarks.harness.names import MATMUL
from benchmarks.tables.markdown import measured, source
from benchmarks.tables.rates import PEER_NAMES, by_op, number, unit


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
    heads = str(s["heads_q"])
    if s["heads_q"] != s["heads_kv"]:
        heads += f"/{s['heads_kv']}"
    values = f", values {s['value_dim']}" if s.get("value_dim") else ""
    return f"D={s['head_dim']}{values}, {heads} heads, {mask}, {s['dtype']}"


def caption(results: dict) -> str:
    name, scale = unit(results)
    dtype = results["cases"][0]["shape"]["dtype"]
    matmul = statistics.median(
        run["useful_tflops"] * scale
        for case in results["cases"]
        for run in case["runs"]
        if run["op"] == MATMUL and case["shape"]["dtype"] == dtype
    )
    return (
        f"{source(results)}. {name} over the visible pairs, {measured(results)}, and the speed "
        f"relative to the fastest other kernel of the same run. A {dtype} matrix product ran at "
        f"{number(matmul)} {name}."
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
