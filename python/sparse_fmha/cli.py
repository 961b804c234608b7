"""Command line: `python -m sparse_fmha demo` and `python -m sparse_fmha info`.

Exit status: 0 done, 1 this installation or machine cannot do it, 2 bad input. Errors are one line
on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DEMO_MODULES = {"PIL", "matplotlib", "numpy", "rich"}


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
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; argv defaults to the process's arguments."""
    arguments = parser().parse_args(argv)
    if arguments.command == "info":
        from sparse_fmha import info

        print(info.report())
        return 0
    try:
        from sparse_fmha import demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEMO_MODULES:
            raise
        return fail(f"the demo needs {package}: pip install 'sparse-fmha[demo]'", 1)
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        demo.run(**options)
    except demo.InputError as error:
        return fail(error, 2)
    except demo.UnavailableError as error:
        return fail(error, 1)
    return 0


def fail(reason: object, status: int) -> int:
    print("error:", " ".join(str(reason).split()), file=sys.stderr)
    return status
