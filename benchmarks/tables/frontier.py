"""The table of the newest run of benchmarks.studies.frontier."""

from __future__ import annotations

from types import SimpleNamespace

TITLE = "Error and speed over sparsity"
DEVICE = "cuda"
COLUMNS = ("method", "chosen by", "sparsity", "lost probability", "error", "ms", "over dense")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        f"Causal, {s['length']} tokens, {s['heads']}/{s['heads_kv']} heads, D={s['dim']}, "
        f"{s.get('inputs', 'planted')} inputs. Sparsity is the share of the causal pairs that a "
        "method leaves out, lost probability what these have in dense attention, the error that of "
        "the output relative to dense attention's. Whole calls, the selection included; masks that "
        "depend on no input are made before. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, line(row), strict=True)) for row in results["rows"]]


def line(row: dict) -> list[str]:
    lost = "" if row["lost"] is None else f"{row['lost']:.4f}"
    return [
        row["method"], row["chosen_by"], f"{row['sparsity']:.1%}", lost,
        f"{row['error']:.3f}", f"{row['ms']:.4g}", f"{row['dense_ms'] / row['ms']:.2f}x",
    ]  # fmt: skip


TRAINED = SimpleNamespace(  # of a folder of its own
    TITLE="Error and speed over sparsity, a trained model",
    DEVICE=DEVICE,
    COLUMNS=COLUMNS,
    caption=caption,
    rows=rows,
)
