"""The table of the newest run of benchmarks.studies.skip_training."""

from __future__ import annotations

TITLE = "Training with skipped tiles"
DEVICE = "cpu"
BEFORE, DENSE, SKIPPING = "before", "trained on, dense", "trained on, skipping"
COLUMNS = ("asked to skip", "threshold", "model", "skipped", "tokens predicted", "loss")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    first, *_, last = results["losses"]
    return (
        f"A causal model of two layers, {s['heads']}/{s['heads_kv']} heads, D={s['dim']}, trained "
        f"for {s['steps']} steps on texts of {s['length']} tokens in which phrases come back "
        f"(loss {first:.2f} to {last:.2f}), then for {s['tuned']} steps more with dense attention, "
        "or with the threshold (BLASST, arXiv:2512.12087). All are tried on the same new texts, "
        f"with the threshold. {source}."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for row in results["rows"]:
        values = (
            f"{row['wanted']:.0%}", f"{row['threshold']:.2g}", row["model"],
            f"{row['skipped']:.1%}", f"{row['right']:.1%}", f"{row['loss']:.3f}",
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
