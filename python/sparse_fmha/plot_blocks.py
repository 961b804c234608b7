"""A picture of a block mask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sparse_fmha import _block_lists
from sparse_fmha.plot import ACCENT

if TYPE_CHECKING:
    from sparse_fmha.block_mask import BlockMask

COLORS = {"not listed": "white", "full": "#1f77b4", "partial": ACCENT}


def plot(mask: BlockMask, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
    """Writes a PNG: the blocks of one head, and a histogram of blocks per row over all heads.

    Args:
        mask: the mask; it is read back from its device.
        path: PNG file to write.
        batch, head: which lists; those that serve all where the mask has one for all.

    Raises:
        IndexError: there is no such batch entry or head.
        ImportError: matplotlib is not there.
    """
    shape = mask.counts.shape
    for name, value, size in (("batch", batch, shape[0]), ("head", head, shape[1])):
        if not 0 <= value < size:
            raise IndexError(f"{name} is {value}; the mask has lists for {size}")
    full = _block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    listed = mask.blocks()
    kinds = listed.int() + (listed & ~full).int()  # 0, 1 full, 2 partial

    figure = Figure(figsize=(9, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.imshow(
        kinds[batch, head].cpu().numpy(),
        cmap=ListedColormap(list(COLORS.values())),
        vmin=0,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
    )
    left.set_title(f"batch {batch}, head {head}: {listed[batch, head].float().mean():.1%} listed")
    left.set_xlabel(f"key block ({mask.block_kv} tokens)")
    left.set_ylabel(f"query block ({mask.block_q} tokens)")
    left.legend(
        handles=[Patch(facecolor=c, edgecolor="gray", label=name) for name, c in COLORS.items()],
        fontsize=7,
        loc="upper right",
    )
    per_row = listed.sum(-1).flatten().cpu()
    bins = torch.arange(int(per_row.max()) + 2) - 0.5
    right.hist(per_row.numpy(), bins=bins.numpy() if len(bins) < 100 else 50, color=COLORS["full"])
    right.set_title("all heads")
    right.set_xlabel("key blocks of a query block")
    right.set_ylabel("query blocks")
    figure.savefig(path)
