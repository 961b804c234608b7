"""The results file, and the table that is shown of it."""

from __future__ import annotations

import argparse
import datetime
import json
import re
from pathlib import Path

from benchmarks.harness.names import DENSE, MATMUL, OURS
from benchmarks.tables import targets

SCHEMA = 1
RESULTS = Path(__file__).resolve().parents[1] / "results"


def file_name(results: dict) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", results["device"]["name"].lower()).strip("-")
    stamp = re.sub(r"[-:]", "", results["timestamp"])[:15].replace("T", "-")
    return f"{stamp}-{device[:40].strip('-')}.json"


def stamp() -> dict:
    """What a run's results begin with."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"schema": SCHEMA, "timestamp": now.isoformat(timespec="seconds")}


def add_options(parser: argparse.ArgumentParser, folder: Path) -> None:
    """--seed and --out, for a benchmark whose results have a folder of their own."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=out_path,
        metavar="PATH",
        help=f"results file, or the folder to put it in; without it {folder}, with --tiny none",
    )


def place(results: dict, out: Path) -> Path:
    """`out`, or in that folder a file of the run's own."""
    return out if out.suffix == ".json" else out / file_name(results)


def out_path(text: str) -> Path:
    """The type of an option --out: what `place` takes, known before anything is measured."""
    out = Path(text).absolute()
    file = out.suffix == ".json"
    above = [*out.parents] if file else [out, *out.parents]
    if (file and out.is_dir()) or any(f.exists() and not f.is_dir() for f in above):
        raise argparse.ArgumentTypeError(f"{text}: a folder, or a file NAME.json, is needed")
    return Path(text)


def keep(results: dict, out: Path | None) -> None:
    """Saves a finished run at its place, if it has one, and says where."""
    if out is not None:
        path = place(results, out)
        save(results, path)
        print(f"results: {path}")


def save(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def load(path: Path) -> dict:
    results = json.loads(path.read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {results.get('schema')}, and {SCHEMA} is what is read")
    return results


def newest(folder: Path) -> dict | None:
    """The newest run on a GPU in a folder."""
    runs = sorted(map(load, folder.glob("*.json")), key=lambda r: r["timestamp"])
    gpu = [r for r in runs if r["device"]["type"] == "cuda"]
    return gpu[-1] if gpu else None


def unit(results: dict) -> tuple[str, float]:
    """The unit that a device's rates are shown in, and how many of it make a TFLOP/s."""
    return ("TFLOP/s", 1) if results["device"]["type"] == "cuda" else ("GFLOP/s", 1000)


def number(x: float) -> str:
    """Three digits, more where the number is larger."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def by_op(case: dict, l2: str) -> dict[str, dict]:
    """The runs of the ops that compute attention; ours is the first."""
    runs = {r["op"]: r for r in case["runs"] if r["l2"] == l2 and r["op"] != MATMUL}
    return {OURS: runs.pop(OURS)} | runs


def percent_of_dense(runs: dict[str, dict]) -> float | None:
    """The rate over executed tiles relative to that of our dense kernel on the same tokens."""
    executed, dense = runs[OURS].get("executed_tflops"), runs.get(OURS + DENSE)
    return 100 * executed / dense["useful_tflops"] if executed and dense else None


def share_of_dense(runs: dict[str, dict]) -> float | None:
    """The time in percent of that of our dense kernel on the same tokens."""
    dense = runs.get(OURS + DENSE)
    return 100 * runs[OURS]["ms"]["median"] / dense["ms"]["median"] if dense else None


def target(case: dict, cases: list[dict], l2: str) -> str:
    """What a case with block lists is to reach, as text; empty where nothing is asked. Some targets
    are relative to others of the same run."""
    if case["name"] in targets.SHARES:
        return f"time < {targets.SHARES[case['name']]}%"
    rates = {c["name"]: percent_of_dense(by_op(c, l2)) for c in cases}
    percent = targets.rate(case["name"], {name: rate for name, rate in rates.items() if rate})
    return f"rate >= {percent:.0f}%" if percent else ""


def predicted(ours: dict) -> float | None:
    """The simulated time relative to the measured one."""
    return ours["predicted_ms"] / ours["ms"]["median"] if "predicted_ms" in ours else None


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
