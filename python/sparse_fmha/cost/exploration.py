"""A page that shows what each query of a neighborhood sees, and the tiles that are visited."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sparse_fmha.cost.simulation import Simulation, simulate
from sparse_fmha.cost.tile_problem import joined, triple, walk_of

TEMPLATE = Path(__file__).with_name("explore.html")
MAX_PAIRS = 1 << 22  # of listed tiles, which the page draws


class Named(Protocol):
    """A layer of a recording."""

    name: str


class Recorded(Protocol):
    """What `integrations.diffusers.record` yields."""

    @property
    def layers(self) -> Sequence[Named]: ...

    @property
    def density(self) -> Tensor: ...

    @property
    def error(self) -> Tensor: ...


def explore(
    grid: int | Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    tile_q: int | Sequence[int] | None = None,
    tile_k: int | Sequence[int] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    recording: Recorded | None = None,
    out: str | PathLike[str],
) -> Path:
    """Writes one static HTML page, which needs no network.

    One picks a query on the grid, with the mouse or the arrow keys, and sees its window, the tiles
    that its tile visits, and the matrix of all tiles: full, partial or empty. A table says the same
    in words. Key tiles are on a common grid here (`key_tiling="static"` of `simulate`), so that
    they are the columns of one matrix.

    Args:
        grid, window, stride, dilation, causal: as in `neighborhood_attention`.
        tile_q, tile_k: as in `simulate`; default: the best.
        others: more settings for the page's drop-down by title; each has the arguments from grid to
            tile_k by name, and may have `source`, a line of text.
        out: the page to write.
        recording: of a run, by `integrations.diffusers.record`: the page also shows its density by
            layer and head, and the error if that was recorded.

    Raises:
        ValueError, TypeError: as `simulate`, or a problem with too many tiles to draw.
        OSError: the page cannot be written.
        ImportError: the extension `_C` is not installed.
    """
    own: dict[str, Any] = {
        "grid": grid, "window": window, "stride": stride, "dilation": dilation,
        "causal": causal, "tile_q": tile_q, "tile_k": tile_k,
    }  # fmt: skip
    if others is not None and (
        not isinstance(others, Mapping)
        or not all(isinstance(x, str) and isinstance(y, Mapping) for x, y in others.items())
    ):
        raise TypeError(f"others must be a mapping of settings by title, got {others!r}")
    if not isinstance(out, (str, PathLike)):
        raise TypeError(f"out must be a path, got {out!r}")
    recorded = None if recording is None else _run(recording)
    problems = [_problem("", **own)]
    for title, given in (others or {}).items():
        try:
            problems.append(_problem(title, **given))
        except (TypeError, ValueError) as error:
            raise type(error)(f"others[{title!r}]: {error}") from None
    path = Path(out)
    page = TEMPLATE.read_text(encoding="utf-8").replace("__PROBLEMS__", _data(problems))
    page = page.replace("__RECORDING__", _data(recorded))
    path.write_text(page, encoding="utf-8")
    return path


def _data(value: object) -> str:
    # "<" cannot end the script that holds the data.
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _run(recording: Recorded) -> dict[str, Any]:
    if not all(hasattr(recording, name) for name in ("layers", "density", "error")):
        raise TypeError(
            "recording must be what integrations.diffusers.record yields, got "
            f"{type(recording).__name__}"
        )
    density, error = (
        [[round(x, 4) for x in row] for row in table.tolist()]
        for table in (recording.density, recording.error)
    )
    names = [layer.name for layer in recording.layers]
    return {"layers": names, "density": density, "error": error}


def _problem(title: str, source: str = "", **given: Any) -> dict[str, Any]:
    result = simulate(**given, key_tiling="static")
    pairs = round(result.visited.mean * result.query_tiles)
    if pairs > MAX_PAIRS:
        raise ValueError(
            f"grid must have at most {MAX_PAIRS} pairs of tiles that are visited, got {pairs} on "
            f"{joined(result.grid)}"
        )
    told = f"grid {joined(result.grid)}, window {joined(result.window)}"
    for name, values in (("stride", result.stride), ("dilation", result.dilation)):
        told += f", {name} {joined(values)}" if max(values) > 1 else ""
    causal = f", causal {joined(map(int, result.causal))}" if any(result.causal) else ""
    return {
        "title": title or told + causal,
        "source": f"{told}{causal}. {source}" if title else source,
        "cost": (
            f"{result.query_tiles} query tiles of {joined(result.tile_q)} tokens, key tiles of "
            f"{joined(result.tile_k)}: {result.visited.mean:.2f} visited in the mean, "
            f"{result.visited.worst} by the worst; {result.full.mean:.2f} full. "
            f"{result.executed_flops / result.useful_flops:.2f} times the useful FLOPs, at most "
            f"{result.speedup_bound:.2f}x over dense attention."
        ),
        "given": len(result.grid),
        "grid": triple(result.grid),
        "axes": [_axis(result, axis) for axis in range(3)],
    }


def _axis(result: Simulation, axis: int) -> dict[str, Any]:
    """Tables of one axis: the window of each token; its query tile (row) and key tile (column);
    each row's first column and number of columns, visited and full. Tokens at a distance of the
    dilation have tiles of their own."""
    from sparse_fmha._extension import _C  # only here, as the rest works without it

    walk = walk_of(result.grid, result.window, result.stride, result.dilation, result.causal)
    tiles = triple(result.tile_q), triple(result.tile_k)
    one = (1, 1, 1)
    length, dilation = walk[0][axis], walk[3][axis]
    size_q, size_k = (tile[axis] for tile in tiles)
    windows: list[tuple[int, int]] = [(0, 0)] * length
    row_of, column_of = [0] * length, [0] * length
    rows: list[tuple[int, int, int, int]] = []
    columns = 0
    for residue in range(min(dilation, length)):
        of_class = length // dilation + (residue < length % dilation)
        for position in range(of_class):
            token = position * dilation + residue
            begin, size, *_ = _C.tiles.axis(walk, axis, residue, (one, one), False, position)
            windows[token] = begin, begin + size
            row_of[token] = len(rows) + position // size_q
            column_of[token] = columns + position // size_k
        for first in range(0, of_class, size_q):
            origin, count, full_first, full = _C.tiles.axis(walk, axis, residue, tiles, True, first)
            start = columns + origin // size_k
            rows.append((start, count, start + full_first, max(full, 0)))
        columns += -(-of_class // size_k)
    return {
        "dilation": dilation,
        "windows": windows,
        "row_of": row_of,
        "column_of": column_of,
        "rows": rows,
        "columns": columns,
    }
