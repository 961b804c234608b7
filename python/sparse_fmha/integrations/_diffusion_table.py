"""The methods of `enable` by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from sparse_fmha.integrations._diffusion_joint import PSA, SVG, Rectified, Sol
from sparse_fmha.integrations._diffusion_masks import (
    VSA,
    CubeTopK,
    Draft,
    Nabla,
    Radial,
    SlidingTile,
    Subblock,
)
from sparse_fmha.integrations._diffusion_methods import BlockSparse, Dense, Neighborhood, Sparse
from sparse_fmha.integrations._diffusion_skip import Skip

METHODS: dict[str, type[Any]] = {
    "neighborhood": Neighborhood,
    "block_sparse": BlockSparse,
    "dense": Dense,
    "sol": Sol,
    "subblock": Subblock,
    "cube_top_k": CubeTopK,
    "vsa": VSA,
    "radial": Radial,
    "nabla": Nabla,
    "sliding_tile": SlidingTile,
    "svg": SVG,
    "draft": Draft,
    "rectified": Rectified,
    "psa": PSA,
    "skip": Skip,
}


def as_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a JSON file: lists are tuples there."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}


def options_of(method: str) -> list[str]:
    """The names of a method's options.

    Raises:
        ValueError, TypeError: there is no such method.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be one of {list(METHODS)}, got {type(method).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    return [option.name for option in fields(METHODS[method]) if option.init]


def make(method: str, options: Mapping[str, Any]) -> Dense | Sparse:
    """Makes the method of a name; checks its options as far as possible without a grid."""
    names = options_of(method)
    kind = METHODS[method]
    allowed = [option for option in fields(kind) if option.init]
    for name in options:
        if name not in names:
            raise TypeError(f"options of method {method!r} must be among {names}, got {name!r}")
    for option in allowed:
        needed = option.default is MISSING and option.default_factory is MISSING
        if needed and option.name not in options:
            raise TypeError(f"{option.name} must be given for method {method!r}")
    made: Dense | Sparse = kind(**options)
    return made
