"""Generates source files from the lists of GPU kernels, csrc/kernels/ARCH_PASS.def.

    kernel_list.py [--rows=REGEX] FOLDER [ARCH...]

writes into the folder the source files of all rows of the architectures (as in SPARSE_FMHA_ARCHS),
or of those in whose name the regular expression is found (as in SPARSE_FMHA_ROWS),
kernel_rows.inc, which names these rows for the registry, skip_tiles.inc, which tells the CPU of
all forward rows that skip key tiles, and row_costs.inc, by which a call chooses among rows that
differ in their query tile. Prints ARCH:FILE for each source file.

Rows that differ in dtype, head dim and architecture alone share a source file: reading CuTe takes
longer than compiling a row, and much longer where a row needs the widths below.

A list has Python syntax: one call `kernel(field=value, ...)` per entry, every field once; those of
OPTIONAL may be left out. An entry for a mechanism of SHARED is a kernel for several mechanisms,
with a row for each of them. A later row for the same requests has another tile_q, and a name that
says so.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import arch_table

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
DTYPES = {"half_t": "float16", "bfloat16_t": "bfloat16"}
# The widths of Hopper's matrix instructions that CuTe always defines, and 80, which
# sm90/common/scores_of_80_keys.h does. Without a row's width a selector of CuTe silently falls back
# to 16, which sm90/common/tile_traits.h rejects. All widths take 30 s to compile.
COMMON_WIDTHS = {16, 32, 64, 80, 96, 128, 192, 256}
ALL_WIDTHS = "#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED\n"


# Kernels whose mechanism stands for others.
PACKED = "PackedSequences"
DILATED = "DilatedNeighborhood"
SHARED = {
    "DenseOrCausal": ("Dense", "Causal"),
    PACKED: ("Dense", "Causal"),
    DILATED: ("Neighborhood",),
}
BY_COSTS = {"Dense", "Causal"}  # mechanisms whose calls choose among rows
# Families and passes whose kernels test whether keys have a bias.
BIAS_OPTIONAL = {("sm90", "backward_dq"), ("sm90", "backward_dkv")}


class ListError(Exception):
    """A list cannot be read; the message has file, line and reason."""


class Row(NamedTuple):
    """One kernel."""

    arch: arch_table.GpuArch
    list: str  # the architecture in the list's name; its rows may serve others too
    direction: str  # the pass; `pass` is a Python keyword
    mechanism: str
    element: str
    head_dim: int
    tile_q: int
    tile_k: int
    stages: int
    schedule: str = ""  # of sm90, forward pass only
    skipping: str = "kNever"
    bias: str = "kNone"
    warps: int = 0  # of sm80, not of decode
    sharing: int = 0  # these two of sm80, backward passes only
    held: str = ""
    blocks: int = 1  # the rest of sm90, forward pass only
    of_values: int = 0  # head dim of v and out; 0: that of q and k
    tile_ns: int = 0
    step_ns: int = 0
    alone_ns: int = 0
    kernel_mechanism: str = ""  # of the kernel, where it serves several
    further: bool = False  # whether an earlier row takes the same requests

    @property
    def skips(self) -> bool:
        return self.skipping == "kByThreshold"

    @property
    def key_bias(self) -> bool:
        """Whether keys may have a bias; those of backward passes may also have none."""
        return self.bias == "kPerKey" or (self.arch.family, self.direction) in BIAS_OPTIONAL

    @property
    def packed(self) -> bool:
        """Whether sequences share one dimension of tokens."""
        return self.kernel_mechanism == PACKED

    @property
    def dilated(self) -> bool:
        """Whether it is for dilations that take other rows several launches."""
        return self.kernel_mechanism == DILATED

    @property
    def mechanism_name(self) -> str:
        return _snake_case(self.mechanism)

    @property
    def value_dim(self) -> int:
        return self.of_values or self.head_dim

    @property
    def dtype(self) -> str:
        return DTYPES[self.element]

    @property
    def name(self) -> str:
        """Such as sm90_dense_bfloat16_d128_skip, .._d128_bias, .._d128_q64 or .._d192_v128."""
        dims = f"d{self.head_dim}" + (f"_v{self.of_values}" if self.of_values else "")
        return self._name(self.arch.name, f"{self.mechanism_name}_{self.dtype}_{dims}")

    @property
    def file(self) -> str:
        """The name of the source file, such as sm90_dense_skip."""
        return self._name(self.list, _snake_case(self.kernel_mechanism or self.mechanism))

    def _name(self, arch: str, what: str) -> str:
        of = "" if self.direction == "forward" else f"{self.direction}_"
        end = "_skip" if self.skips else "_bias" if self.bias == "kPerKey" else ""
        end += "_packed" if self.packed else "_dilated" if self.dilated else ""
        tile = f"_q{self.tile_q}" if self.further else ""
        return f"{arch}_{of}{what}{end}{tile}"


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0:
        return node.value
    raise ValueError("a whole number above 0")


def _type(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("the name of a type")


def _one_of(*names: str) -> Callable[[ast.expr], str]:
    def read(node: ast.expr) -> str:
        if isinstance(node, ast.Name) and node.id in names:
            return node.id
        raise ValueError(" or ".join(names))

    return read


def _elements(node: ast.expr) -> list[str]:
    names = (
        [n.id for n in node.elts if isinstance(n, ast.Name)] if isinstance(node, ast.List) else []
    )
    if names and len(names) == len(node.elts) and set(names) <= set(DTYPES):
        return names
    raise ValueError(f"a list of {', '.join(DTYPES)}")


def _archs(node: ast.expr) -> list[arch_table.GpuArch]:
    known = {arch.name: arch for arch in arch_table.read()}
    names = (
        [n.id for n in node.elts if isinstance(n, ast.Name)] if isinstance(node, ast.List) else []
    )
    if names and len(names) == len(node.elts) and set(names) <= set(known):
        return [known[name] for name in names]
    raise ValueError(f"a list of {', '.join(known)}")


Fields = dict[str, Callable[[ast.expr], Any]]
TILES: Fields = {
    "mechanism": _type,
    "elements": _elements,
    "head_dim": _number,
    "tile_q": _number,
    "tile_k": _number,
    "stages": _number,
}
WARPS: Fields = {
    "warps": _number,
    "sharing": _number,
    "held": _one_of("kNone", "kFirst", "kSecond", "kBoth"),
}
SKIPPING: Fields = {"skipping": _one_of("kNever", "kByThreshold")}
# By family (core/archs.def) and pass.
PASSES: dict[str, dict[str, Fields]] = {
    "sm90": {
        "forward": TILES | {"schedule": _one_of("kTurns", "kFree")} | SKIPPING,
        "backward_dq": TILES,
        "backward_dkv": TILES,
        "backward_fused": TILES,
        "decode": TILES | SKIPPING,
    },
    "sm80": {
        "forward": TILES | SKIPPING | {"warps": _number},
        "backward_dq": TILES | WARPS,
        "backward_dkv": TILES | WARPS,
        "backward_fused": TILES | WARPS,
        "decode": TILES | SKIPPING | {"archs": _archs},
    },
}
# Fields with a default.
COSTS = dict.fromkeys(("tile_ns", "step_ns", "alone_ns"), _number)
OPTIONAL: dict[str, dict[str, Fields]] = {
    "sm90": {
        "forward": {"bias": _one_of("kNone", "kPerKey"), "blocks": _number, "value_dim": _number}
        | COSTS
    },
}


def read(path: Path) -> list[Row]:
    """Reads the kernels of one list, whose file name gives the architecture and the pass.

    Raises:
        ListError: a field is unknown, missing, given twice or has an invalid value, or two entries
            give the same kernel.
    """
    arch_name, _, direction = path.stem.partition("_")
    arch = next((a for a in arch_table.read() if a.name == arch_name), None)
    if arch is None or direction not in PASSES[arch.family]:
        raise ListError(f"{path}:1: the file's name is not an architecture, _, and a pass")
    try:
        statements = ast.parse(path.read_text()).body
    except SyntaxError as error:
        raise ListError(f"{path}:{error.lineno}: {error.msg}") from None
    rows: dict[str, Row] = {}
    for statement in statements:
        try:
            optional = OPTIONAL.get(arch.family, {}).get(direction, {})
            fields = _fields(statement, PASSES[arch.family][direction], optional)
            archs, elements = fields.pop("archs", [arch]), fields.pop("elements")
            mechanism = fields.pop("mechanism")
            fields["of_values"] = fields.pop("value_dim", 0)
            shared = {"kernel_mechanism": mechanism} if mechanism in SHARED else {}
            served = SHARED.get(mechanism, (mechanism,))
            for one, element, of in itertools.product(archs, elements, served):
                row = Row(one, arch.name, direction, of, element, **fields, **shared)
                first = rows.get(row.name)
                chosen = direction == "decode" or (first and first.step_ns and row.step_ns)
                if first and chosen and first.tile_q != row.tile_q:
                    row = row._replace(further=True)  # calls choose by costs or numbers of rows
                if row.name in rows:
                    raise ValueError(f"a second row for {row.name}")
                rows[row.name] = row
        except ValueError as error:
            raise ListError(f"{path}:{statement.lineno}: {error}") from None
    return list(rows.values())


def _fields(statement: ast.stmt, required: Fields, optional: Fields) -> dict[str, Any]:
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError("an entry is kernel(field=value, ...)")
    if call.func.id != "kernel" or call.args:
        raise ValueError("an entry is kernel(field=value, ...)")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    names = [keyword.arg for keyword in call.keywords]
    fields = required | optional
    allowed = f"the fields are {', '.join(fields)}"
    for name in names:
        if name not in fields:
            raise ValueError(f"unknown field {name}; {allowed}")
        if names.count(name) > 1:
            raise ValueError(f"field {name} is given twice")
    for name in required:
        if name not in given:
            raise ValueError(f"field {name} is missing; {allowed}")
    values = {}
    for name in given:
        try:
            values[name] = fields[name](given[name])
        except ValueError as error:
            raise ValueError(f"{name} is {ast.unparse(given[name])}; {error} is needed") from None
    return values


def read_all() -> list[Row]:
    return [row for path in sorted(KERNELS.glob("*.def")) for row in read(path)]


def source(rows: list[Row]) -> str:
    """The source file of rows of one architecture, pass and mechanism."""
    family, direction = rows[0].arch.family, rows[0].direction
    common = family != "sm90" or {row.tile_k for row in rows} <= COMMON_WIDTHS
    widths = "" if common else ALL_WIDTHS
    parts = [definition(row) for row in rows]
    return f"""\
{widths}#include "sparse_fmha/{family}/{direction.replace("_", "/")}/launch.h"

namespace sparse_fmha {{
{chr(10).join(parts)}}}  // namespace sparse_fmha
"""


def definition(row: Row) -> str:
    """The function that makes the registry's row of one kernel, and with it the kernel."""
    parameters: dict[str, Any] = {
        "Mechanism": row.kernel_mechanism or row.mechanism,
        "Element": f"cutlass::{row.element}",
        "kHeadDim": row.head_dim,
        "kTileQ": row.tile_q,
        "kTileK": row.tile_k,
        "kStages": row.stages,
    }
    config = {"forward": "KernelConfig", "decode": "DecodeConfig"}.get(row.direction, "TileConfig")
    if row.schedule:
        parameters["kSchedule"] = f"Schedule::{row.schedule}"
    if row.direction in ("forward", "decode"):
        parameters["kSkipping"] = f"Skipping::{row.skipping}"
    if row.warps:
        parameters["kWarps"] = row.warps
    if row.held:
        config = "BackwardConfig"
        parameters["kSharing"] = row.sharing
        parameters["kHeld"] = f"Held::{row.held}"
    before, after = ("WithKeyBias<", ">") if row.bias == "kPerKey" else ("", "")
    if row.blocks > 1:
        before, after = f"WithBlocks<{before}", f"{after}, {row.blocks}>"
    if row.of_values:
        before, after = f"WithValueDim<{before}", f"{after}, {row.of_values}>"
    arch = f"Arch::{row.arch.enumerator}"
    of_row = f", {row.mechanism}" if row.kernel_mechanism else ""
    if row.arch.family == "sm80":  # two architectures
        if row.direction == "decode":  # which share kernels
            of_row = f", {arch}"
        else:
            parameters["kArch"] = arch
    listed = ",\n".join(f"      /*{name}=*/{value}" for name, value in parameters.items())
    return f"""\
KernelRow {row.name}() {{
  using namespace {row.arch.family};
  using Config = {before}{config}<
{listed}>{after};
  return kernel_row<Config{of_row}>("{row.name}");
}}
"""


def write_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:  # writing would cause a recompile
        path.write_text(text)


def write(folder: Path, archs: list[str], wanted: str = "") -> dict[str, list[Row]]:
    """Writes the files into the folder; returns the rows of each source file.

    Raises:
        ListError: `wanted` is no regular expression, or is found in no row's name.
    """
    rows = read_all()
    try:
        built = [row for row in rows if row.arch.nvcc in archs and re.search(wanted, row.name)]
    except re.error as error:
        raise ListError(f"SPARSE_FMHA_ROWS={wanted}: {error}") from None
    if wanted and archs and not built:
        raise ListError(f"SPARSE_FMHA_ROWS={wanted}: no row of {', '.join(archs)} has such a name")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[Row]] = {}
    for row in built:
        files.setdefault(row.file, []).append(row)
    for name, members in files.items():
        write_changed(folder / f"{name}.cu", source(members))
    names = "".join(f"SPARSE_FMHA_ROW({row.name})\n" for row in built)
    write_changed(folder / "kernel_rows.inc", names)
    tiles = dict.fromkeys(
        f"SPARSE_FMHA_SKIP_TILE({r.arch.enumerator}, {r.mechanism}, {r.head_dim}, "
        f"{r.value_dim}, {r.tile_k})\n"
        for r in sorted(rows, key=lambda row: (row.head_dim, row.value_dim))
        if r.skips and r.direction == "forward"
    )
    write_changed(folder / "skip_tiles.inc", "".join(tiles))
    costs = dict.fromkeys(
        f"SPARSE_FMHA_ROW_COST({r.arch.enumerator}, {r.mechanism}, {str(r.packed).lower()}, "
        f"{r.head_dim}, {r.value_dim}, {r.tile_q}, {r.tile_k}, {r.blocks}, "
        f"{r.tile_ns}, {r.step_ns}, {r.alone_ns or r.step_ns})\n"
        for r in rows
        if r.direction == "forward" and r.mechanism in BY_COSTS and not (r.skips or r.key_bias)
    )
    write_changed(folder / "row_costs.inc", "".join(costs))
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("archs", nargs="*")
    parser.add_argument("--rows", default="")
    given = parser.parse_args()
    try:
        for file, members in write(given.folder, given.archs, given.rows).items():
            print(f"{members[0].arch.nvcc}:{file}")
    except ListError as error:
        sys.exit(str(error))
