"""What was compiled in, with what, and what the GPU compiler made of it."""

from __future__ import annotations

from typing import TypedDict

# Not a class: one of the keys is a keyword of Python.
_CompiledRow = TypedDict(
    "_CompiledRow",
    {
        "name": str,
        "arch": str,
        "pass": str,
        "mechanism": str,
        "dtype": str,
        "head_dim": int,
        "skips": bool,
        "tile_q": int,
        "tile_k": int,
        "stages": int,
        "threads": int,
        "smem_bytes": int,
    },
)


class KernelRow(_CompiledRow, total=False):
    """A row of the kernel table; see `kernels`. GPU rows have all keys."""

    registers: int
    spill_bytes: int


class BuildInfo(TypedDict):
    """See `build_info`."""

    version: str
    archs: list[str]
    cpu_isas: list[str]
    compiler: str
    torch: str
    cuda: str
    cutlass: str
    kernels: dict[str, dict[str, int]]


class KernelTable(list[KernelRow]):
    """Rows of the kernel table, one dict per compiled kernel; prints as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no kernels compiled in"
        columns = list(dict.fromkeys(key for row in self for key in row))
        lines = [columns] + [[str(row.get(key, "")) for key in columns] for row in self]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def build_info() -> BuildInfo:
    """Versions the library was built with.

    Keys: `version`, `archs` (GPU architectures, empty for a CPU-only build), `cpu_isas`,
    `compiler`, `torch` (the headers; any torch >= 2.10 runs it), `cuda` and `cutlass` (empty for a
    CPU-only build), and `kernels`: by kernel name the figures of ptxas, in registers per thread
    and bytes; also of `list_plan`, which prepares block lists and is no row of `kernels()`.

    Raises:
        ImportError: as `kernels`.
    """
    from sparse_fmha._extension import _C

    return _C.build_info()


def kernels() -> KernelTable:
    """Compiled kernels as a list of dicts that prints as a table.

    `pass` is "forward", "backward_dq", "backward_dkv" or "decode", `head_dim` is the largest that
    the kernel takes,
    `tile_q` and `tile_k` are tokens (0: chosen at run time), `skips` says whether key tiles can be
    left out by a threshold, `smem_bytes` is per thread block. GPU rows also have `registers` per
    thread and `spill_bytes`, as ptxas reported them.

    Raises:
        ImportError: the extension `_C` is not there for this Python; the ops work without it.
    """
    from sparse_fmha._extension import _C

    figures = build_info()["kernels"]
    rows = KernelTable(_C.kernel_table())
    for row in rows:
        if row["name"] in figures:
            of_row = figures[row["name"]]
            row["registers"] = of_row["registers"]
            row["spill_bytes"] = of_row["spill_store_bytes"] + of_row["spill_load_bytes"]
    return rows
