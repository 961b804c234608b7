"""Stores the report of ptxas for each kernel, and fails the build if it shows a slow kernel.

    ptxas.py compile COMMAND...            runs a compile command, reports beside its object file
    ptxas.py collect BASICS OUT OBJECT...  merges basics and reports into a C++ string literal

A register spill, or a WGMMA that ptxas serialises (its notes C7500 to C7599), makes a kernel much
slower but never incorrect, so only the build can notice.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import kernel_list

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SHAPE = re.compile(r"N7cutlass\d+(\w+?)ELi(\d+)E")  # dtype and head dim in a row's symbol
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SMEM = re.compile(r"(\d+) bytes smem")
FIGURE = re.compile(r"ptxas info +:|    \d+ bytes stack frame")
SERIALISED = re.compile(r"\(C75\d\d\)")


def parse(log: str, file: str) -> dict[str, dict]:
    """The figures of each row in the object of a file; kernels of no row go by the file's name."""
    rows: dict[tuple[str, ...], list[str]] = {}  # a kernel may have several
    for row in kernel_list.read_all():
        if row.file == file:
            rows.setdefault((row.element, str(row.head_dim)), []).append(row.name)
    texts: dict[str, str] = {}
    for text in re.split(f"(?={ENTRY.pattern})", log):
        if entry := ENTRY.match(text):
            shape = SHAPE.search(entry[1])
            for name in rows.get(shape.groups(), [file]) if shape else [file]:
                texts[name] = texts.get(name, "") + text
    return {name: figures(text) for name, text in texts.items()}


def figures(log: str) -> dict:
    """The worst figures of the functions in a log."""
    frames = [tuple(map(int, m.groups())) for m in STACK.finditer(log)]
    return {
        "entries": len(ENTRY.findall(log)),
        "registers": max((int(m) for m in REGISTERS.findall(log)), default=0),
        "stack_bytes": max((f[0] for f in frames), default=0),
        "spill_store_bytes": sum(f[1] for f in frames),
        "spill_load_bytes": sum(f[2] for f in frames),
        "static_smem_bytes": max((int(m) for m in SMEM.findall(log)), default=0),
    }


def faults(log: str, kernels: dict[str, dict]) -> list[str]:
    """The reasons why the object must not be used."""
    found = sorted({line.strip() for line in log.splitlines() if SERIALISED.search(line)})
    for name, of in kernels.items():
        if of["spill_store_bytes"] or of["spill_load_bytes"]:
            found.append(
                f"register spills in {name}: {of['spill_store_bytes']} bytes stored, "
                f"{of['spill_load_bytes']} bytes loaded"
            )
    if not kernels or not all(of["registers"] for of in kernels.values()):
        found.append("ptxas printed no figures: is -Xptxas -v among the flags?")
    return found


def report_path(obj: str) -> Path:
    return Path(obj + ".ptxas.json")


def compile_object(command: list[str]) -> int:
    """Runs the command; keeps the object and its report only if both are good."""
    obj = command[command.index("-o") + 1]
    report = report_path(obj)
    report.unlink(missing_ok=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    notes = [line for line in done.stderr.splitlines() if not is_figure(line)]
    if notes:
        print("\n".join(notes), file=sys.stderr)
    if done.returncode:
        return done.returncode
    kernels = parse(done.stderr, Path(obj).name.split(".")[0])
    wrong = faults(done.stderr, kernels)
    if wrong:
        Path(obj).unlink(missing_ok=True)
        for line in wrong:
            print(f"{Path(obj).name}: {line}", file=sys.stderr)
        return 1
    report.write_text(json.dumps(kernels))
    return 0


def is_figure(line: str) -> bool:
    """Whether a line of a ptxas report is only a figure, of no interest while building."""
    return not SERIALISED.search(line) and FIGURE.match(line) is not None


def collect(basics: str, out: str, objects: list[str]) -> int:
    info = json.loads(Path(basics).read_text())
    info["cpu_isas"] = info["cpu_isas"].split(";")
    info["kernels"] = {}
    for obj in objects:
        report = report_path(obj)
        if not report.is_file():
            print(f"{report} is missing: {obj} was not checked for spills", file=sys.stderr)
            return 1
        kernels = json.loads(report.read_text())
        info["kernels"].update(kernels)
        for name, of in kernels.items():
            print(f"  {name}: {of['registers']} registers, no spills")
    Path(out).write_text(f'R"json({json.dumps(info)})json"\n')
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        sys.exit(compile_object(sys.argv[2:]))
    sys.exit(collect(sys.argv[2], sys.argv[3], sys.argv[4:]))
