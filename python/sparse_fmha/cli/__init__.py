"""Command line: `sparse-fmha`, or `python -m sparse_fmha`.

Exit status: 0 done, 1 this installation or machine cannot do it, 2 bad input. Errors are one line
on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_fmha import __version__

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

UNABLE = (ImportError, RuntimeError)  # this installation or machine cannot do it
ERRORS = (*UNABLE, ValueError, TypeError, OSError)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sparse-fmha", description="Sparse attention kernels.")
    top.add_argument("--version", action="version", version=f"sparse-fmha {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="denoise a photograph by neighborhood attention",
        description="Adds noise to a photograph and removes it by non-local means, computed as "
        "2-D neighborhood attention and as dense attention. Writes a picture, prints a table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    absent = argparse.SUPPRESS  # help shows no default if there is none
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

    info = commands.add_parser(
        "info",
        help="versions, devices and compiled kernels",
        description="Prints versions, what each device here can run, and what is wrong.",
    )
    info.add_argument("--kernels", action="store_true", help="the whole table of kernels")

    add_explain(commands)
    add_report(commands)

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
    add_explore(commands)
    return top


def add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="test a device against fp64, time it, and print a block for a report",
        description="Runs small drawn problems of every mechanism and pass against fp64, and a "
        "short benchmark beside torch's attention. Prints a block of Markdown. Takes about a "
        "minute; kernels that never ran on such a GPU are used.",
    )
    report.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    report.add_argument("--seed", type=int, default=0, metavar="N", help="of the problems")
    report.add_argument("--arch", help="whose kernels a GPU takes; its own if not given")


def add_explore(commands: Commands) -> None:
    explore = commands.add_parser(
        "explore",
        help="a page on which to look at a neighborhood and its tiles",
        description="Writes a static HTML page on which one picks a query and sees its window and "
        "the tiles visited for it. Published settings are in its drop-down. Numbers are given as "
        "for simulate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    absent = argparse.SUPPRESS
    explore.add_argument("--grid", required=True, metavar="L", help="tokens", default=absent)
    explore.add_argument("--window", required=True, metavar="W", help="keys seen", default=absent)
    explore.add_argument("--stride", default="1", metavar="S", help="queries that share a window")
    explore.add_argument("--dilation", default="1", metavar="D", help="distance of keys seen")
    explore.add_argument("--causal", default="0", metavar="C", help="0 or 1")
    for name, what in (("--tile-q", "queries"), ("--tile-k", "keys")):
        explore.add_argument(
            name, metavar="T", default=absent, help=f"{what} of a tile; if not given, the best"
        )
    explore.add_argument("--out", default="explore.html", metavar="PATH", help="page to write")


def add_explain(commands: Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="which kernel a call takes, and how long it should take",
        description="Says in at most five lines which kernel a call takes, why, and how long it "
        "should take on an H100. Nothing is computed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    absent = argparse.SUPPRESS
    explain.add_argument("mechanism", choices=("dense", "neighborhood", "block-sparse"))
    explain.add_argument("tokens", metavar="TOKENS", help="a length, or a grid such as 30x48x80")
    explain.add_argument("--why-not", action="store_true", help="a line for each other kernel")
    explain.add_argument(
        "--arch", default="sm90", help="sm90, cpu, another of `info`, or auto for this machine's"
    )
    explain.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16"
    )
    explain.add_argument("--batch", type=int, default=1, metavar="N", help="entries")
    explain.add_argument("--heads", type=int, default=1, metavar="N", help="of the queries")
    explain.add_argument(
        "--heads-kv", type=int, default=absent, metavar="N", help="of keys; if not given, as many"
    )
    explain.add_argument("--head-dim", type=int, default=128, metavar="N", help="up to 256")
    explain.add_argument("--causal", default=absent, metavar="C", help="0 or 1; 0 if not given")
    explain.add_argument("--window", default=absent, metavar="W", help="keys seen")
    explain.add_argument(
        "--stride", default=absent, metavar="S", help="queries that share a window"
    )
    explain.add_argument("--dilation", default=absent, metavar="D", help="distance of keys seen")
    explain.add_argument("--extra", type=int, default=absent, metavar="N", help="extra tokens")
    explain.add_argument(
        "--density",
        type=float,
        default=absent,
        metavar="P",
        help="share of the blocks that are listed, 0 to 1, drawn at random",
    )
    for name, what in (("--block-q", "queries"), ("--block-kv", "keys")):
        explain.add_argument(
            name, type=int, default=absent, metavar="N", help=f"{what} of a block; 128 if not given"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; argv defaults to the process's arguments."""
    arguments = parser().parse_args(argv)
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        COMMANDS[arguments.command](**options)
    except ERRORS as error:
        return report(error, "sparse-fmha[demo]")
    return 0


def run_demo(**options: Any) -> None:
    from sparse_fmha.cli import demo

    demo.run(**options)


def run_info(*, kernels: bool) -> None:
    from sparse_fmha.cli import info

    print(info.report(kernels))


def run_explain(**options: Any) -> None:
    from sparse_fmha.cli import explain_command

    explain_command.run(**options)


def run_explore(**options: Any) -> None:
    from sparse_fmha.cli import explore_command

    explore_command.run(**options)


def run_report(**options: Any) -> None:
    from sparse_fmha.cli import report_command

    report_command.run(**options)


def run_simulate(**options: Any) -> None:
    from sparse_fmha.cli import simulate_command

    simulate_command.run(**options)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": run_demo,
    "explain": run_explain,
    "explore": run_explore,
    "info": run_info,
    "report": run_report,
    "simulate": run_simulate,
}


def report(error: Exception, install: str = "") -> int:
    """Prints one line on stderr and returns the exit status.

    Args:
        error: the error that ends the program.
        install: what to install with pip if a package is missing.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError) and install and "pip install" not in reason:
        reason += f": pip install '{install}'"
    print("error:", reason, file=sys.stderr)
    return 1 if isinstance(error, UNABLE) else 2


@contextlib.contextmanager
def one_line_errors(install: str = "") -> Iterator[None]:
    """Ends the program with one line on errors, as the commands do; wrap imports and `main` in it.

    Args:
        install: what to install with pip if a package is missing.
    """
    try:
        yield
    except ERRORS as error:
        sys.exit(report(error, install))
