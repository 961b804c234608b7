"""Command line: `python -m sparse_fmha demo`, `info` and `simulate`.

Exit status: 0 done, 1 this installation or machine cannot do it, 2 bad input. Errors are one line
on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

OPTIONAL_MODULES = {"PIL", "matplotlib", "numpy", "rich"}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m sparse_fmha", description="Sparse attention kernels."
    )
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="denoise a photograph by neighborhood attention",
        description="Adds noise to a photograph and removes it by non-local means, computed as "
        "2-D neighborhood attention and as dense attention. Writes a picture, prints a table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    absent = argparse.SUPPRESS  # help shows no default where there is none
    demo.add_argument("--image", type=Path, metavar="PATH", default=absent, help="your own picture")
    demo.add_argument(
        "--out", type=Path, default=Path("demo.png"), metavar="PATH", help="PNG to write"
    )
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to attend")
    demo.add_argument("--window", type=int, default=21, metavar="W", help="W x W pixels attended")
    demo.add_argument(
        "--sigma", type=float, default=25.0, metavar="S", help="noise, of a range of 0 to 255"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise")
    demo.add_argument(
        "--resize", type=int, metavar="N", default=absent, help="shrink the longer side to N pixels"
    )

    commands.add_parser("info", help="versions, devices and compiled kernels")

    simulate = commands.add_parser(
        "simulate",
        help="count the tiles that neighborhood attention visits",
        description="Counts the tiles that neighborhood attention visits, and predicts its time on "
        "an H100. Numbers for each axis have an x between them, such as 30x48x80; a single one "
        "serves all axes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    simulate.add_argument("--grid", required=True, metavar="L", help="tokens", default=absent)
    simulate.add_argument("--window", required=True, metavar="W", help="keys seen", default=absent)
    simulate.add_argument("--stride", default="1", metavar="S", help="queries that share a window")
    simulate.add_argument("--dilation", default="1", metavar="D", help="distance of keys seen")
    simulate.add_argument("--causal", default="0", metavar="C", help="0 or 1")
    simulate.add_argument("--heads", type=int, default=1, metavar="N", help="of the queries")
    simulate.add_argument("--batch", type=int, default=1, metavar="N", help="entries")
    simulate.add_argument("--head-dim", type=int, default=128, metavar="N", help="up to 256")
    simulate.add_argument("--extra", type=int, default=0, metavar="N", help="extra tokens")
    simulate.add_argument(
        "--tile-q", metavar="T", default=absent, help="queries of a tile; if not given, the best"
    )
    simulate.add_argument(
        "--tile-k", metavar="T", default=absent, help="keys of a tile; if not given, the best"
    )
    simulate.add_argument("--static", action="store_true", help="key tiles on a common grid")
    simulate.add_argument(
        "--all",
        type=int,
        nargs="?",
        const=10,
        metavar="N",
        default=absent,
        help="a table of the best N tile pairs; 10 if N is not given",
    )
    simulate.add_argument("--plot", metavar="PATH", default=absent, help="PNG to write")
    simulate.add_argument(
        "--query",
        metavar="Q",
        default=absent,
        help="token that is plotted; the centre if not given",
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; argv defaults to the process's arguments."""
    arguments = parser().parse_args(argv)
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    if arguments.command == "info":
        from sparse_fmha import info

        print(info.report())
        return 0
    if arguments.command == "simulate":
        from sparse_fmha import simulate_command

        try:
            simulate_command.run(**options)
        except ModuleNotFoundError as error:
            return missing_package("this option", error)
        except ImportError as error:
            return fail(error, 1)
        except (ValueError, TypeError, OSError) as error:
            return fail(error, 2)
        return 0
    try:
        from sparse_fmha import demo
    except ModuleNotFoundError as error:
        return missing_package("the demo", error)
    try:
        demo.run(**options)
    except demo.InputError as error:
        return fail(error, 2)
    except demo.UnavailableError as error:
        return fail(error, 1)
    return 0


def missing_package(what: str, error: ModuleNotFoundError) -> int:
    package = (error.name or "").partition(".")[0]
    if package not in OPTIONAL_MODULES:
        raise error
    return fail(f"{what} needs {package}: pip install 'sparse-fmha[demo]'", 1)


def fail(reason: object, status: int) -> int:
    print("error:", " ".join(str(reason).split()), file=sys.stderr)
    return status
