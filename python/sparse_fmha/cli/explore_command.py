"""`sparse-fmha explore`."""

from __future__ import annotations

from typing import Any

from sparse_fmha.cli.options import flags_of, numbers_of, sequence_of
from sparse_fmha.cost.exploration import explore
from sparse_fmha.integrations import _diffusion_presets
from sparse_fmha.patterns import sliding_tile


def run(
    *,
    grid: str,
    window: str,
    stride: str,
    dilation: str,
    causal: str,
    out: str,
    tile_q: str | None = None,
    tile_k: str | None = None,
) -> None:
    """Writes a page of a neighborhood, with the presets for diffusers that are neighborhoods.

    Raises:
        ValueError, TypeError, OSError: bad input.
        ImportError: the extension `_C` is not installed.
    """
    page = explore(
        sequence_of("--grid", grid),
        numbers_of("--window", window),
        stride=numbers_of("--stride", stride),
        dilation=numbers_of("--dilation", dilation),
        causal=flags_of("--causal", causal),
        tile_q=None if tile_q is None else numbers_of("--tile-q", tile_q),
        tile_k=None if tile_k is None else numbers_of("--tile-k", tile_k),
        others=presets(),
        out=out,
    )
    print(f"page: {page}")


def presets() -> dict[str, dict[str, Any]]:
    """Those with a grid, by name, as `explore` takes them."""
    found: dict[str, dict[str, Any]] = {}
    for name, preset in _diffusion_presets.known().items():
        options = dict(preset.options)
        if preset.grid is None or preset.method not in ("neighborhood", "sliding_tile"):
            continue
        if preset.method == "sliding_tile":
            window, stride = sliding_tile(preset.grid, options["tile"], options["window"])
            options = {"window": window, "stride": stride}
        source = f"{preset.source}: {preset.figure}"
        found[f"preset {name}"] = {"grid": preset.grid, "source": source, **options}
    return found
