"""Options of studies that run blocks of models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import report


def add(parser: argparse.ArgumentParser, cases: Mapping[str, Any], folder: Path) -> None:
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--case", choices=cases, action="append", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, with --tiny cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="few tokens and channels, to try it")
    report.add_options(parser, folder)


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, cases: Mapping[str, Any]
) -> argparse.Namespace:
    """The arguments, with a device and the names of the cases; ends the program for --list."""
    args = parser.parse_args(argv)
    if args.list:
        for name, case in cases.items():
            print(f"{name:20} {case.what}")
        sys.exit(0)
    args.device = args.device or ("cpu" if args.tiny else "cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch sees no CUDA device; --tiny runs on the CPU")
    args.case = args.case or list(cases)
    return args
