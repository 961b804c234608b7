"""Results files, and a table of plain text."""

from __future__ import annotations

import argparse
import datetime
import json
import re
from pathlib import Path

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


def at_least_one(text: str) -> int:
    """The type of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_options(parser: argparse.ArgumentParser, folder: Path) -> None:
    """--seed and --out, for a benchmark whose results have a folder of their own."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=out_path,
        metavar="PATH",
        help=f"results file, or the folder to put it in; without it {folder}, with --tiny none",
    )


def add_op_options(parser: argparse.ArgumentParser, folder: Path, iterations: int = 7) -> None:
    """The same, and --tiny and --iterations, for a study that times ops."""
    parser.add_argument("--tiny", action="store_true", help="small problems, also without a GPU")
    parser.add_argument(
        "--iterations",
        type=at_least_one,
        default=iterations,
        metavar="N",
        help="timed calls of each op",
    )
    add_options(parser, folder)


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


def out_of(args: argparse.Namespace, folder: Path) -> Path | None:
    """Where the results of a study go; nowhere with --tiny, unless --out says so."""
    return args.out or (None if args.tiny else folder)


def keep(results: dict, out: Path | None) -> None:
    """Saves a finished run at its place, if it has one, and says where."""
    if out is not None:
        path = place(results, out)
        save(results, path)
        print(f"results: {path}")


def keep_so_far(results: dict, out: Path | None) -> None:
    """Saves what a run has measured, at the place of `keep`: it may be cut short."""
    if out is not None:
        save(results, place(results, out))


def save(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def load(path: Path) -> dict:
    results = json.loads(path.read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {results.get('schema')}, and {SCHEMA} is what is read")
    return results


def newest(folder: Path, device: str = "cuda") -> dict | None:
    """The newest run in a folder on a type of device."""
    runs = sorted(map(load, folder.glob("*.json")), key=lambda r: r["timestamp"])
    found = [r for r in runs if r["device"]["type"] == device]
    return found[-1] if found else None


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    return "\n".join(form.format(*row).rstrip() for row in [header, *rows])
