"""Whether two builds have the same GPU machine code, whatever its functions are called.

    compare_sass.py OLD NEW

OLD and NEW are libraries or object files, or what `cuobjdump -sass` printed of them. Functions are
matched by their instructions; names, line information and the order of functions do not count.
Prints how many match and every function that has no match, and exits with 1 if there is one. Of a
function that has none it says whether there is one with the same instructions in the same order but
for the numbers of registers and the bits that schedule them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FUNCTION = re.compile(r"\s*Function : (\S+)")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?;)\s*(?:/\* (0x[0-9a-f]+) \*/)?\s*$")
ENCODING = re.compile(r"\s*/\* (0x[0-9a-f]+) \*/\s*$")  # an instruction's second word
REGISTER = re.compile(r"\b(U?[RPB])\d+")
SYMBOL = re.compile(r"`\([^)]*\)")  # in operands of calls


class Function(NamedTuple):
    name: str
    code: tuple[str, ...]  # instructions with their encoding, one per line


def parse(dump: str) -> list[Function]:
    """The functions of a dump, in order."""
    functions: list[tuple[str, list[str]]] = []
    for line in dump.splitlines():
        if start := FUNCTION.match(line):
            functions.append((start[1], []))
        elif functions and (match := INSTRUCTION.match(line)):
            text = SYMBOL.sub("`()", re.sub(r"\s+", " ", match[1]))
            functions[-1][1].append(f"{text} {match[2] or ''}".rstrip())
        elif functions and functions[-1][1] and (match := ENCODING.match(line)):
            functions[-1][1][-1] += f" {match[1]}"
    return [Function(name, tuple(code)) for name, code in functions]


def dump(path: Path) -> str:
    """The output of cuobjdump for a binary, or the text of a file that is such a dump."""
    if path.read_bytes()[:4] != b"\x7fELF":
        return path.read_text()
    tool = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if tool is None:
        sys.exit("no cuobjdump on PATH; set CUOBJDUMP, or give dumps of `cuobjdump -sass`")
    done = subprocess.run([tool, "-sass", path], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tool} -sass {path}: {done.stderr.strip()}")
    return done.stdout


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Maps names to demangled C++ names, if c++filt is available."""
    names = list(names)
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = "\n".join(names)
    done = subprocess.run([tool], input=text, capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


class Comparison(NamedTuple):
    matched: int
    renamed: int  # of the matches
    only_old: list[Function]
    only_new: list[Function]


def compare(old: list[Function], new: list[Function]) -> Comparison:
    """Matches each function with one of equal code, preferably of equal name."""
    left = Counter(function.code for function in new)
    only_old = []
    for function in old:
        if left[function.code]:
            left[function.code] -= 1
        else:
            only_old.append(function)
    spare = Counter(function.code for function in old)
    only_new = []
    for function in new:
        if spare[function.code]:
            spare[function.code] -= 1
        else:
            only_new.append(function)
    same = sum((Counter(old) & Counter(new)).values())
    matched = len(old) - len(only_old)
    return Comparison(matched, matched - same, only_old, only_new)


def without_registers(function: Function) -> tuple[str, ...]:
    """The instructions without register numbers, and so without encodings."""
    return tuple(REGISTER.sub(r"\1", line.partition(" ;")[0]) for line in function.code)


def first_difference(old: Function, new: Function) -> str:
    for i, (a, b) in enumerate(zip(old.code, new.code)):  # noqa: B905  the shorter one ends it
        if a != b:
            return f"instruction {i} was `{a}`, is `{b}`"
    return "one is the beginning of the other"


def report(found: Comparison) -> list[str]:
    """Lines that list what matches and what does not."""
    lines = [f"{found.matched} functions match, {found.renamed} of them under another name"]
    shapes = Counter(without_registers(function) for function in found.only_new)
    unmatched = [("old", f) for f in found.only_old] + [("new", f) for f in found.only_new]
    names = demangle({function.name for _, function in unmatched})
    twins = defaultdict(list)
    for function in found.only_new:
        twins[function.name].append(function)
    for where, function in unmatched:
        lines.append(f"only in {where}: {names[function.name]}, {len(function.code)} instructions")
        if where == "old" and shapes[without_registers(function)]:
            lines.append("  one in new has these instructions but for registers and scheduling")
        elif where == "old" and twins[function.name]:
            lines.append(f"  {first_difference(function, twins[function.name].pop(0))}")
    return lines


def main(old: str, new: str) -> int:
    before, after = (parse(dump(Path(path))) for path in (old, new))
    for path, functions in ((old, before), (new, after)):
        if not functions:
            print(f"{path} has no GPU functions", file=sys.stderr)
            return 1
    found = compare(before, after)
    print("\n".join(report(found)))
    return 1 if found.only_old or found.only_new else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
