"""What `enable` checks before it changes a transformer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from sparse_fmha.integrations._diffusion_hooks import Hooks
from sparse_fmha.integrations._diffusion_models import Model


def check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_steps(name: str, value: float) -> float:
    """A number of steps is an int, a share a float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of steps or a share of them, got {value!r}")
    if isinstance(value, Integral):
        check_count(name, int(value))
        return int(value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be an int, or a share from 0 to 1, got {value!r}")
    return float(value)


def check_by_step(by_step: Sequence[Mapping[str, Any]]) -> None:
    good = is_sequence(by_step) and all(isinstance(each, Mapping) for each in by_step)
    if not good:
        raise TypeError(f"by_step must be mappings of options, one for each step, got {by_step!r}")


def is_sequence(value: object) -> bool:
    """Whether it is a sequence of anything but characters or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    if not is_sequence(grid):
        raise TypeError(f"grid must be the tokens of each axis, got {grid!r}")
    for length in grid:
        check_count("grid", length)
    return tuple(grid)


def check_axes(method: object, grid: Sequence[int] | None, name: str, row: Model) -> None:
    if getattr(method, "video", False) and row.axes != 3:
        raise ValueError(
            "method must be one for images, because the grid of "
            f"{name} has {row.axes} axes, got {type(method).__name__}, which is for videos"
        )
    axes = ("window", "stride", "dilation", "tile", "cube")
    values = {field: getattr(method, field, None) for field in axes}
    for field, value in {**values, "grid": grid}.items():
        if isinstance(value, Sequence) and len(value) != row.axes:
            raise ValueError(
                f"{field} must have one entry for each of the {row.axes} axes of the grid of "
                f"{name}, got {value!r}"
            )


def check_layers(dense_layers: Collection[int], count: int, name: str) -> None:
    if not is_sequence(dense_layers) and not isinstance(dense_layers, (set, frozenset)):
        raise TypeError(f"dense_layers must be indices of blocks, got {dense_layers!r}")
    for index in dense_layers:
        check_count("dense_layers", index)
        if index >= count:
            raise ValueError(f"dense_layers must be blocks 0 to {count - 1} of {name}, got {index}")
    for index in dense_layers:
        if list(dense_layers).count(index) > 1:
            raise ValueError(f"dense_layers must name each block once, got {index} twice")


def check_processors(layers: list[Any], hooks: Hooks | None, name: str, row: Model) -> None:
    originals = {} if hooks is None else hooks.originals()
    for index, layer in enumerate(layers):
        kind = type(originals.get(layer, layer.processor)).__name__
        if kind not in row.processors:
            raise NotImplementedError(
                f"the attention processor of block {index} of {name} must be one of "
                f"{list(row.processors)}, got {kind}"
            )
