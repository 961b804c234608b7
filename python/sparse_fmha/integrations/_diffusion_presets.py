"""Named settings of `enable` with a source; each is a JSON file in the folder `presets`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        method, options: the method and its options.
        source: a paper or program.
        figure: what the source measured with them, or "no figure published". Not measured here.
        grid: tokens per axis that the source has; None: any that the method takes.
        steps: the number of steps that the source has, if it says.
        first_dense_steps, last_dense_steps, dense_layers: as in `enable`.
        note: how it differs from the source.
    """

    name: str
    models: tuple[str, ...]
    method: str
    options: Mapping[str, Any]
    source: str
    figure: str
    grid: tuple[int, ...] | None = None
    steps: int | None = None
    first_dense_steps: float = 0
    last_dense_steps: float = 0
    dense_layers: tuple[int, ...] = field(default=())
    note: str = ""

    def fits(self, grid: Sequence[int]) -> bool:
        """Whether the method runs on a grid; a source's own grid is not the only one."""
        try:
            table.make(self.method, self.options).check(Layout(tuple(grid)))
        except ValueError:
            return False
        return True


@functools.cache
def known() -> dict[str, Preset]:
    """All presets by name."""
    return {path.stem: _read(path) for path in sorted(FOLDER.glob("*.json"))}


def find(name: str) -> Preset:
    """Raises ValueError if there is none of this name."""
    if name not in known():
        raise ValueError(f"preset must be one of {list(known())}, got {name!r}")
    return known()[name]


def _read(path: Path) -> Preset:
    given = json.loads(path.read_text(encoding="utf-8"))
    for key in ("models", "grid", "dense_layers"):
        if key in given:
            given[key] = tuple(given[key])
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in given["options"].items()}
    return Preset(**{**given, "name": path.stem, "options": lists})
