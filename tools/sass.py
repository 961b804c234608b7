"""Whether the GPU code of an object file is what it should be.

    sass.py FILE...             prints how many kernels each image of object files or libraries has
    sass.py compile COMMAND...  runs a compile command; keeps the object only if its code is good

Wrong are an image without kernels, a kernel that does nothing (as when its body is compiled for
other GPUs alone), a kernel of attention without the matrix instructions of its family, and one that
uses local memory. Nothing of it shows in the exit status of nvcc, and without that GPU no test can
notice. The build compiles every GPU object through this program. PTX, of which drivers make the
code for GPUs without an image, is held to the same by its text.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cubin

# The low 12 bits of an instruction of 16 bytes, alike from compute capability 8.0 to 12.1.
HMMA = frozenset({0x23C})
HGMMA = frozenset({0x9F0, 0xDF0})  # queries in shared memory, in registers
LOCAL = {0x387: "STL", 0x983: "LDL"}
IDLE = frozenset({0x918, 0x947, 0x94D})  # NOP, BRA, EXIT
FEWEST = 24  # instructions of a kernel that does something; one of an empty body has 2


def mangled(*names: str) -> tuple[str, ...]:
    return tuple(f"{len(name)}{name}" for name in names)


FAMILY = re.compile(r"_ZN11sparse_fmha4(sm\d\d)\d")
# Kernels of mma.sync that are of no family, or of Hopper's.
MMA_SYNC = mangled(
    "anchor_means_kernel",
    "anchor_keys_kernel",
    "search_keys",
    "choose_blocks",
    "few_rows_decode_kernel",
)
FLOAT32 = re.compile(r"(search_keys|choose_blocks)If")  # these compute products with FMAs
# These make lists, and take one of several streams by its index, which registers cannot.
LOCAL_ARRAYS = mangled("keep_blocks", "keep_columns")
ENTRY = re.compile(r"\.entry\s+(\w+)\(")


class Products(NamedTuple):
    """The instructions that a kernel must have."""

    name: str
    codes: frozenset[int]
    ptx: str


MMA = Products("HMMA", HMMA, "mma.sync")
WGMMA = Products("HGMMA", HGMMA, "wgmma.mma_async")


class Kernel(NamedTuple):
    """Of one image."""

    image: str  # sm_80, or compute_80 for PTX
    name: str
    faults: list[str]


def products_of(name: str) -> Products | None:
    """What computes products in the kernel of this mangled name; None if nothing has to."""
    if FLOAT32.search(name):
        return None
    if any(each in name for each in MMA_SYNC):
        return MMA
    family = FAMILY.match(name)
    if family is None:
        return None
    return WGMMA if family[1] == "sm90" else MMA


def census(code: bytes) -> Counter[int]:
    """How often a function has each instruction; the second byte's upper half is its predicate."""
    found: Counter[int] = Counter()
    for (low, high), n in Counter(zip(code[0::16], code[1::16], strict=True)).items():
        found[low | (high & 15) << 8] += n
    return found


def code_faults(name: str, code: bytes) -> list[str]:
    found = census(code)
    work = sum(n for op, n in found.items() if op not in IDLE)
    if work < FEWEST:
        return [f"does nothing: {work} instructions"]
    faults = []
    products = products_of(name)
    if products and not any(found[op] for op in products.codes):
        faults.append(f"has no {products.name}")
    local = [f"{found[op]} {text}" for op, text in LOCAL.items() if found[op]]
    if local and not any(each in name for each in LOCAL_ARRAYS):
        faults.append(f"uses local memory: {', '.join(local)}")
    return faults


def ptx_faults(name: str, text: str) -> list[str]:
    products = products_of(name)
    if products and products.ptx not in text:
        return [f"has no {products.ptx}"]
    return [] if text.count(";") >= FEWEST else ["does nothing"]


def kernels(path: Path) -> Iterator[Kernel]:
    """All kernels of all images."""
    for image in cubin.images(path):
        kind = "compute" if image.is_ptx else "sm"
        target = f"{kind}_{image.capability}"
        count = 0
        if image.is_ptx:
            _, *parts = ENTRY.split(image.content.decode(errors="replace"))
            for name, text in zip(parts[0::2], parts[1::2], strict=True):
                count += 1
                yield Kernel(target, name, ptx_faults(name, text))
        else:
            for name, code in cubin.functions(image.content):
                count += 1
                yield Kernel(target, name, code_faults(name, code))
        if not count:
            yield Kernel(target, "image", ["has no kernels"])


def faults(path: Path) -> list[str]:
    """The reasons why the file must not be used.

    Raises:
        ValueError, LookupError: its images cannot be read.
    """
    return faults_of(list(kernels(path)))


def faults_of(found: list[Kernel]) -> list[str]:
    """The same of the kernels of a file."""
    if not found:
        return ["there is no GPU code"]
    return [f"{k.image}: {k.name} {fault}" for k in found for fault in k.faults]


def compile_object(command: list[str]) -> int:
    """Runs the command; keeps the object only if its code is good."""
    status = subprocess.call(command)
    if status:
        return status
    obj = Path(command[command.index("-o") + 1])
    found = faults(obj)
    if found:
        obj.unlink()
    for fault in found:
        print(f"{obj.name}: {fault}", file=sys.stderr)
    return int(bool(found))


def main(paths: list[str]) -> int:
    if paths[:1] == ["compile"]:
        return compile_object(paths[1:])
    wrong = 0
    for path in paths:
        found = list(kernels(Path(path)))
        counts = Counter(kernel.image for kernel in found)
        text = ", ".join(f"{count} kernels for {image}" for image, count in counts.items())
        print(f"{path}: {text or 'no kernels'}")
        for fault in faults_of(found):
            print(f"  {fault}", file=sys.stderr)
            wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, LookupError, ValueError) as error:
        sys.exit(f"error: {error}")
