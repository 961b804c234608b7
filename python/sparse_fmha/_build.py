"""The compiled kernels, the build's versions, and the figures of ptxas for each kernel."""

from __future__ import annotations

from typing import TypedDict

# Functional syntax, because the key `pass` is a Python keyword.
_CompiledRow = TypedDict(
    "_CompiledRow",
    {
        "name": str,
        "arch": str,
        "pass": str,
        "mechanism": str,
        "dtype": str,
        "head_dim": int,
        "value_dim": int,
        "skips": bool,
        "key_bias": bool,
        "packed": bool,
        "dilated": bool,
        "tile_q": int,
        "tile_k": int,
        "stages": int,
        "threads": int,
        "blocks": int,
        "smem_bytes": int,
    },
)


class KernelRow(_CompiledRow, total=False):
    """One row of the kernel table; see `kernels`. GPU rows have every key."""

    registers: int
    spill_bytes: int
    status: dict[str, str]


class BuildInfo(TypedDict):
    """See `build_info`."""

    version: str
    archs: list[str]
    images: list[str]
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
    """Returns the versions that the library was built with.

    Keys: `version`, `archs` (GPU architectures, empty for a CPU-only build), `images` (GPUs that
    there is machine code for, and `compute_80` for PTX, which drivers compile), `cpu_isas`,
    `compiler`, `torch` (version of the headers; any torch >= 2.10 runs the library), `cuda` and
    `cutlass` (empty for a CPU-only build), and `kernels`, which maps kernel names to the figures of
    ptxas (registers per thread, and bytes). `kernels` also has `list_plan`, which prepares block
    lists and is not a row of `kernels()`.

    Raises:
        ImportError: see `kernels`.
    """
    from sparse_fmha._extension import _C

    return _C.build_info()


def kernels() -> KernelTable:
    """Returns the compiled kernels as a list of dicts that prints as a table.

    `pass` is "forward", "backward_dq", "backward_dkv", "backward_fused" (all gradients) or
    "decode". `head_dim` and `value_dim` are the largest head dimensions that the kernel takes, of q
    and k and of v and out. `tile_q` and `tile_k` are in tokens (0: chosen at run time).
    `skips` says whether the kernel can skip key tiles by a threshold, `key_bias` whether keys may
    have a bias, `packed` whether it takes packed sequences, `dilated` whether it is for dilations
    that take others several launches. `blocks` is the number of thread blocks on a
    multiprocessor at a time, `smem_bytes` is per thread block. Of rows that differ in `tile_q`
    alone a call takes the fastest by a model; see `explain`. GPU rows also have `registers` per
    thread and `spill_bytes`, as reported by ptxas, and `status`: by compute capability, how far
    they are tested there ("measured", "ran" or "compiled"; see `allow_untested`).

    Raises:
        ImportError: the extension `_C` is missing for this Python; the ops work without it.
    """
    from sparse_fmha._extension import _C

    figures = build_info()["kernels"]
    rows = KernelTable(_C.kernel_table())
    for row in rows:
        if row["arch"] != "cpu":
            row["status"] = _C.arch_status(row["arch"])
        if row["name"] in figures:
            of_row = figures[row["name"]]
            row["registers"] = of_row["registers"]
            row["spill_bytes"] = of_row["spill_store_bytes"] + of_row["spill_load_bytes"]
    return rows
