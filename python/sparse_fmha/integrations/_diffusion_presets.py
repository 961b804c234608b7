"""Named settings of `enable` with a source; each is a JSON file in the folder `presets`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_layout import Layout

FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """Settings of `enable`, and where they are from.

    Attributes:
        name: what `enable(preset=)` takes.
        models: names of the transformer classes that the source speaks of.
        method, options: the method and its options, if `layers` do not say all of them.
        layers, by_step: as `enable` takes them.
        source: a paper or program.
        figure: what the source measured with them, or "no figure published". Not measured here.
        grid: tokens per axis that the source has; None: any that the method takes.
        steps: the number of steps that the source has, if it says.
        first_dense_steps, last_dense_steps, dense_layers, min_tokens: as in `enable`.
        note: how it differs from the source.
    """

    name: str
    models: tuple[str, ...]
    source: str
    figure: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    by_step: tuple[Mapping[str, Any], ...] = ()
    grid: tuple[int, ...] | None = None
    steps: int | None = None
    first_dense_steps: float = 0
    last_dense_steps: float = 0
    dense_layers: tuple[int, ...] = field(default=())
    min_tokens: int | None = None
    note: str = ""

    def fits(self, grid: Sequence[int]) -> bool:
        """Whether the method runs on a grid; a source's own grid is not the only one."""
        layout = Layout(tuple(grid))
        if layout.image < (self.min_tokens or 0):
            return False
        each = [{"method": self.method, **self.options}] if self.method else []
        try:
            for given in (*each, *filter(None, self.layers.values())):
                options = table.as_given({k: v for k, v in given.items() if k != "method"})
                table.make(given["method"], options).check(layout)
        except ValueError:
            return False
        return True


@functools.cache
def known() -> dict[str, Preset]:
    """All presets by name."""
    return {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}


def find(preset: str | PathLike[str] | Preset) -> Preset:
    """One by its name, or of a file.

    Raises:
        ValueError: there is none of this name, or the file is not one.
        TypeError: it is neither a name, a path nor a preset.
        OSError: the file cannot be read.
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, (str, PathLike)):
        raise TypeError(f"preset must be a name, a path or one of presets(), got {preset!r}")
    if isinstance(preset, PathLike) or preset.endswith(".json"):
        return read(Path(preset))
    if preset not in known():
        raise ValueError(
            f"preset must be one of {list(known())}, or the path of a .json file, got {preset!r}"
        )
    return known()[preset]


KINDS: dict[str, Any] = {
    "models": list,
    "source": str,
    "figure": str,
    "options": dict,
    "layers": dict,
    "by_step": list,
    "grid": (list, type(None)),
    "dense_layers": list,
}  # in a file


def read(path: Path) -> Preset:
    """The preset of a file; its name is the file's."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"preset must be a JSON file, got {path}: {error}") from None
    needed = {"models", "source", "figure"}
    allowed = {each.name for each in fields(Preset)} - {"name"}
    if not isinstance(given, dict) or not needed <= given.keys() <= allowed:
        raise ValueError(
            f"preset must be a JSON file with {sorted(needed)}, and others of {sorted(allowed)}, "
            f"got {path}"
        )
    for key, kind in KINDS.items():
        if key in given and not isinstance(given[key], kind):
            raise ValueError(f"{key} of preset {path} has a wrong type, got {given[key]!r}")
    if not all(isinstance(model, str) for model in given["models"]):
        raise ValueError(f"models of preset {path} must be names, got {given['models']!r}")
    for key in ("models", "grid", "dense_layers", "by_step"):
        if given.get(key) is not None:
            given[key] = tuple(given[key])
    options = table.as_given(given.get("options", {}))
    return Preset(**{**given, "name": path.stem, "options": options})
