"""The table of the newest run of benchmarks.studies.frontier."""

from __future__ import annotations

from types import SimpleNamespace

TITLE = "Error and speed over sparsity"
DEVICE = "cuda"
COLUMNS = (
    "method", "chosen by", "pairs", "sparsity", "lost probability", "error", "ms", "over dense",
)  # fmt: skip
ERRORS = (0.01, 0.05, 0.2, 0.5)
BEST = ("error at most", "pairs", "fastest method", "chosen by", "sparsity", "error", "over dense")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        f"{s['length']} tokens, {s['heads']}/{s['heads_kv']} heads, D={s['dim']}, "
        f"{s.get('inputs', 'planted')} inputs. Sparsity is the share of the pairs that a method "
        "leaves out of those that it could see, lost probability what these have in dense "
        "attention, the error that of the output relative to dense attention's, which is causal or "
        "of all pairs as the method is. Whole calls, the selection included; masks that depend on "
        "no input are made before. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, line(row), strict=True)) for row in results["rows"]]


def line(row: dict) -> list[str]:
    lost = "" if row["lost"] is None else f"{row['lost']:.4f}"
    return [
        row["method"], row["chosen_by"], _pairs(row), f"{row['sparsity']:.1%}", lost,
        f"{row['error']:.3f}", f"{row['ms']:.4g}", f"{row['dense_ms'] / row['ms']:.2f}x",
    ]  # fmt: skip


def best(results: dict) -> list[dict[str, str]]:
    """For each bound of the error, the fastest method that keeps it, if it is faster than dense."""
    found = []
    for pairs in dict.fromkeys(map(_pairs, results["rows"])):
        for most in ERRORS:
            fit = [r for r in results["rows"] if _pairs(r) == pairs and r["error"] <= most]
            fit = [r for r in fit if r["ms"] < r["dense_ms"]]
            values = [f"{most:.0%}", pairs, "dense attention"]
            if fit:
                row = max(fit, key=lambda r: r["dense_ms"] / r["ms"])
                own = dict(zip(COLUMNS, line(row), strict=True))
                values[2] = own["method"]
                values += [own[c] for c in ("chosen by", "sparsity", "error", "over dense")]
            found.append(dict(zip(BEST, values, strict=False)))
    return found


def _pairs(row: dict) -> str:
    return "causal" if row.get("causal", True) else "all"


TRAINED = SimpleNamespace(  # of a folder of its own
    TITLE="Error and speed over sparsity, a trained model",
    DEVICE=DEVICE,
    COLUMNS=COLUMNS,
    caption=caption,
    rows=rows,
)
