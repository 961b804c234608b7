"""Writes the measured numbers into README.md: python -m benchmarks.tables.readme [--check]

Tables for each kind of device go between the markers, each from the newest results file that has
such cases: sequences, with the rate over visible pairs and the speed relative to the fastest peer
of the same run in each cell; and grids, block lists and skipping, a line for each case. Stripes
have results files of their own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.harness import report
from benchmarks.harness.names import DENSE, MATMUL, OURS
from benchmarks.harness.report import (
    by_op,
    load,
    number,
    percent_of_dense,
    predicted,
    share_of_dense,
    target,
    unit,
)
from benchmarks.tables import diffusion as diffusion_table
from benchmarks.tables import scaling as scaling_table
from benchmarks.tables import skipping as skip_table
from benchmarks.tables import stripes as stripe_table
from benchmarks.tables.published import NATTEN_MS
from sparse_fmha.cli import one_line_errors

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN = "<!-- measured numbers: written by python -m benchmarks.tables.readme -->"
END = "<!-- end of measured numbers -->"
NONE_YET = "No results file yet; `python -m benchmarks` writes one."
PEER_NAMES = {
    "fa3": "FlashAttention-3",
    "cudnn": "cuDNN",
    "flash2": "FlashAttention-2",
    "flex": "FlexAttention",
    "flex_tiled": "FlexAttention in tiles",
    "sta": "sliding tile attention",
    "vsa": "fastvideo-kernel",
    "torch": "torch",
}


GRID_PEERS = {
    "over FlashAttention-3 dense": "fa3" + DENSE,
    "over cuDNN dense": "cudnn" + DENSE,
    "over FlexAttention": "flex",
    "over FlexAttention in tiles": "flex_tiled",
    "over sliding tile attention": "sta",
}
GRID_COLUMNS = (  # of which those are shown that have a number
    *("case", "grid", "window", "stride", "ms", "useful {unit}", "executed {unit}"),
    *("of our dense rate", *GRID_PEERS, "NATTEN, ms", "simulated / measured"),
)


BLOCK_PEERS = {
    "over FlashAttention-3 dense": "fa3" + DENSE,
    "over FlexAttention": "flex",
    "over fastvideo-kernel": "vsa",
}
BLOCK_COLUMNS = (
    *("case", "blocks", "listed", "ms", "of our dense time", "of our dense rate", "target"),
    *BLOCK_PEERS,
)


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
    for results in sorted(map(load, folder.glob("*.json")), key=lambda r: r["timestamp"]):
        for one in TABLES:
            cases = [c for c in results["cases"] if kind(c) == one]
            if cases:
                latest[results["device"]["type"], one] = results | {"cases": cases}
    order = list(TABLES)
    return dict(sorted(latest.items(), key=lambda x: (x[0][0] != "cuda", order.index(x[0][1]))))


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
    return f"D={s['head_dim']}, {heads} heads, {mask}, {s['dtype']}"


def source(results: dict) -> str:
    """Where, when and of what the numbers are."""
    device = results["device"]
    where = device["name"]
    if "threads" in device:
        where += f" ({device['threads']} threads)"
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["dirty"] else "")
    version = results["versions"]["torch"]
    return f"{where}, torch {version}, {results['timestamp'][:10]}, commit {commit}"


def measured(results: dict) -> str:
    settings = results["settings"]
    return f"median of {settings['iterations']}, {settings['l2'][0]} cache"


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
        f"{source(results)}. {name} over the visible pairs, {measured(results)}; and the speed "
        f"relative to the fastest other kernel in the same run. A {dtype} matrix product ran at "
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


def grid_caption(results: dict) -> str:
    name, _ = unit(results)
    dtypes = ", ".join(dict.fromkeys(case["shape"]["dtype"] for case in results["cases"]))
    return (
        f"Neighborhood attention, {dtypes}, whole ops. {source(results)}. Times are the "
        f"{measured(results)}. Useful {name} are over the visible pairs, executed ones over all "
        "pairs of the tiles that are computed, also relative to the rate of the dense kernel on "
        "the same tokens. The simulated time is the tile simulator's. NATTEN's times are published "
        "ones, of its whole op on another H100 in fp16."
    )


def grid_row(case: dict, l2: str, scale: float) -> dict[str, str]:
    """What is known of a case, by column."""
    s, runs = case["shape"], by_op(case, l2)
    ours, ms = runs[OURS], runs[OURS]["ms"]["median"]
    stride, dilation, causal = (
        [one] * len(s["grid"]) if s.get(name) in (None, one) else s[name]
        for name, one in (("stride", 1), ("dilation", 1), ("causal", False))
    )
    window = "x".join(map(str, s["window"]))
    if set(dilation) != {1}:
        window += ", dilation " + "x".join(map(str, dilation))
    if any(causal):
        axes = ", ".join(str(axis) for axis, flag in enumerate(causal) if flag)
        window += ", causal" if all(causal) else f", causal on axis {axes}"
    row = {
        "case": case["name"],
        "grid": f"{'x'.join(map(str, s['grid']))}, {s['heads_q']} heads, D={s['head_dim']}",
        "window": window,
        "stride": "1" if set(stride) == {1} else "x".join(map(str, stride)),
        "ms": f"{ms:.3g}",
        "useful {unit}": number(ours["useful_tflops"] * scale),
    }
    if "executed_tflops" in ours:
        row["executed {unit}"] = number(ours["executed_tflops"] * scale)
    if percent := percent_of_dense(runs):
        row["of our dense rate"] = f"{percent:.0f}%"
    for column, op in GRID_PEERS.items():
        if op in runs:
            row[column] = f"{runs[op]['ms']['median'] / ms:.2f}x"
    if case["name"] in NATTEN_MS:
        row["NATTEN, ms"] = f"{NATTEN_MS[case['name']]:.1f}"
    if ratio := predicted(ours):
        row["simulated / measured"] = f"{ratio:.2f}"
    return row


def grid_table(results: dict) -> str:
    name, scale = unit(results)
    rows = [grid_row(case, results["settings"]["l2"][0], scale) for case in results["cases"]]
    return lines_of(grid_caption(results), GRID_COLUMNS, rows).replace("{unit}", name)


def lines_of(caption: str, columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    """A line for each row, with the columns that some row has."""
    shown = [column for column in columns if any(column in row for row in rows)]
    lines = [" | ".join(shown), " | ".join("---" for _ in shown)]
    lines += [" | ".join(row.get(column, "") for column in shown) for row in rows]
    return "\n".join([caption, "", *(f"| {line} |" for line in lines)])


def block_caption(results: dict) -> str:
    dtypes = ", ".join(dict.fromkeys(case["shape"]["dtype"] for case in results["cases"]))
    return (
        f"Block-sparse attention, {dtypes}, whole ops; the time of a selection is that of making "
        f"the mask, from q and k to the lists. {source(results)}. Times are the "
        f"{measured(results)}. The rate counts the listed blocks, and is relative to that of our "
        "dense kernel on the same tokens in the same run: at 100% the time is the dense one times "
        "the share that is listed. Lists are random, other ones for each head; heavy: a tenth of "
        "the rows hold half of the blocks; partial: half of the pairs of each listed block are "
        "visible, by a bitmask."
    )


def block_row(case: dict, cases: list[dict], l2: str) -> dict[str, str]:
    """What is known of a case, by column."""
    s, runs = case["shape"], by_op(case, l2)
    lists, ms = s["lists"], runs[OURS]["ms"]["median"]
    row = {
        "case": case["name"],
        "blocks": f"{lists['block_q']}x{lists['block_kv']} of {s['length']} tokens, "
        f"{s['heads_q']} heads, D={s['head_dim']}",
        "listed": f"{100 * lists['density']:.3g}%",
        "ms": f"{ms:.3g}",
    }
    if share := share_of_dense(runs):
        row["of our dense time"] = f"{share:.1f}%"
    if percent := percent_of_dense(runs):
        row["of our dense rate"] = f"{percent:.0f}%"
    if text := target(case, cases, l2):
        row["target"] = text
    for column, op in BLOCK_PEERS.items():
        if op in runs and lists["kind"] != "selected":
            row[column] = f"{runs[op]['ms']['median'] / ms:.2f}x"
    return row


def block_table(results: dict) -> str:
    cases, l2 = results["cases"], results["settings"]["l2"][0]
    rows = [block_row(case, cases, l2) for case in cases]
    return lines_of(block_caption(results), BLOCK_COLUMNS, rows)


def skipping_table(results: dict) -> str:
    rows = [skip_table.row(case, results["settings"]["l2"][0]) for case in results["cases"]]
    caption = skip_table.caption(source(results), measured(results))
    return lines_of(caption, skip_table.COLUMNS, rows)


TABLES = {
    "sequence": table,
    "grid": grid_table,
    "blocks": block_table,
    "skip": skipping_table,
}

# Results of benchmarks of their own, by folder.
FOLDERS = {"stripes": stripe_table, "diffusion": diffusion_table, "scaling": scaling_table}


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
