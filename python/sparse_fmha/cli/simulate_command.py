"""`sparse-fmha simulate`."""

from __future__ import annotations

from sparse_fmha._versions import require
from sparse_fmha.cli.options import flags_of, numbers_of, sequence_of
from sparse_fmha.cost import simulation
from sparse_fmha.cost.tile_problem import joined


def run(
    *,
    grid: str,
    window: str,
    stride: str,
    dilation: str,
    causal: str,
    static: bool,
    tile_q: str | None = None,
    tile_k: str | None = None,
    all: int | None = None,
    plot: str | None = None,
    query: str | None = None,
    **numbers: int,
) -> None:
    """Prints a simulation, or with `all` a table of simulations; plots the best one.

    Raises:
        ValueError, TypeError, OSError: bad input.
        ImportError: a package, or the extension `_C`, is not installed.
    """
    problem = {
        "grid": sequence_of("--grid", grid),
        "window": numbers_of("--window", window),
        "stride": numbers_of("--stride", stride),
        "dilation": numbers_of("--dilation", dilation),
        "causal": flags_of("--causal", causal),
        "key_tiling": "static" if static else "dynamic",
        "tile_q": tile_q and numbers_of("--tile-q", tile_q),
        "tile_k": tile_k and numbers_of("--tile-k", tile_k),
        **numbers,
    }
    if query is not None and plot is None:
        raise ValueError("--query must be given with --plot")
    if all is not None and all < 1:
        raise ValueError(f"--all must be at least 1, got {all}")
    if all is not None:
        require("rich", by="--all", extra="demo")
    if plot is not None:
        require("matplotlib", by="--plot", extra="demo")
    token = None if query is None else sequence_of("--query", query)
    results = simulation.ranking(1 if all is None else all, **problem)
    if plot is not None:
        results[0].plot(plot, token)
    if all is None:
        print(results[0])
    else:
        show(results)
    if plot is not None:
        print(f"picture: {plot}")


def show(results: list[simulation.Simulation]) -> None:
    from rich.console import Console
    from rich.table import Table

    best = results[0]
    table = Table(box=None, header_style="bold", pad_edge=False)
    headings = (
        "queries",
        "keys",
        "query tiles",
        "visited",
        "worst",
        "full",
        "executed",
        "bound",
        "ms",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            joined(result.tile_q),
            joined(result.tile_k),
            f"{result.query_tiles:,}",
            f"{result.visited.mean:.2f}",
            f"{result.visited.worst:,}",
            f"{result.full.mean:.2f}",
            f"{result.executed_flops / result.useful_flops:.3f}x",
            f"{result.speedup_bound:.2f}x",
            f"{result.predicted_ms:.4g}",
        )
    console = Console()
    Console(width=max(console.width, 100)).print(table)
    console.print(
        f"visited, full: key tiles for each query tile, {best.key_tiling}. executed: FLOPs by "
        f"useful ones. bound: speedup over dense, at most {best.perfect_bound:.2f}x. ms: predicted "
        "for an H100.",
        highlight=False,
        soft_wrap=True,
    )
