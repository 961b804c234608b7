"""A picture of a block mask."""

from __future__ import annotations

from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from sparse_fmha.masks import block_lists
from sparse_fmha.plotting.pictures import ACCENT

if TYPE_CHECKING:
    from sparse_fmha.masks.block_mask import BlockMask
    from sparse_fmha.masks.stripe_mask import StripeMask

COLORS = {"not listed": "white", "full": "#1f77b4", "partial": ACCENT}


def plot(mask: BlockMask, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
    """Writes a PNG: the blocks of one head, and a histogram of blocks per row over all heads.

    Args:
        mask: the mask; it is read back from its device.
        path: PNG file to write.
        batch, head: which lists; those that serve all where the mask has one for all.

    Raises:
        IndexError: there is no such batch entry or head.
        ValueError: path does not end in .png.
        ImportError: matplotlib is not there.
    """
    full = block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    listed = mask.blocks()
    _draw(
        path,
        (batch, head),
        listed.int() + (listed & ~full).int(),
        f"key block ({mask.block_kv} tokens)",
        f"query block ({mask.block_q} tokens)",
    )


def plot_stripes(mask: StripeMask, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
    """As `plot`, of the keys that each group of queries sees."""
    rows = f"group of {mask.block_q} queries"
    _draw(path, (batch, head), mask.seen().int(), "key", rows)


def _draw(path: str | Path, place: tuple[int, int], kinds: Tensor, column: str, row: str) -> None:
    """kinds `[B|1, H|1, rows, columns]`: 0, 1 full, 2 partial."""
    batch, head = place
    for name, value, size in zip(("batch", "head"), place, kinds.shape[:2], strict=True):
        if not 0 <= value < size:
            raise IndexError(f"{name} is {value}; the mask has lists for {size}")
    if not fspath(path).endswith(".png"):
        raise ValueError(f"path is {fspath(path)}; it must end in .png")
    listed = kinds > 0
    own = kinds[batch, head].cpu()
    figure = Figure(figsize=(9, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if own.numel():  # without tokens there is no picture
        left.imshow(
            own.numpy(),
            cmap=ListedColormap(list(COLORS.values())),
            vmin=0,
            vmax=2,
            aspect="auto",
            interpolation="nearest",
        )
    share = own.count_nonzero().item() / max(1, own.numel())
    left.set_title(f"batch {batch}, head {head}: {share:.1%} listed")
    left.set_xlabel(column)
    left.set_ylabel(row)
    left.legend(
        handles=[Patch(facecolor=c, edgecolor="gray", label=name) for name, c in COLORS.items()],
        fontsize=7,
        loc="upper right",
    )
    per_row = listed.sum(-1).flatten().cpu()
    bins = [n - 0.5 for n in range(max(per_row.tolist(), default=0) + 2)]
    right.hist(per_row.numpy(), bins=bins if len(bins) < 100 else 50, color=COLORS["full"])
    right.set_title("all heads")
    right.set_xlabel(f"{column.split()[0]}s of a {row.split()[0]}")
    right.set_ylabel("rows of lists")
    figure.savefig(path)
