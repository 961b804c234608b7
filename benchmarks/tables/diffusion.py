"""The table of the newest run of benchmarks.studies.diffusion."""

from __future__ import annotations

TITLE = "Whole diffusion models"
DEVICE = "cuda"
COLUMNS = ("model", "attention", "call, ms", "speedup", "one attention, ms", "speedup of it")


def caption(results: dict, source: str) -> str:
    cut = "; ".join(
        f"{m['what']}: {m['blocks']} of {m['all_blocks']} blocks, {m['text']} text tokens, window "
        f"{'x'.join(map(str, m['window']))}, stride {'x'.join(map(str, m['stride']))}"
        for m in results["models"]
    )
    s = results["settings"]
    return (
        "Whole calls of diffusion transformers of diffusers with random weights, in real shapes. "
        f"`torch` is the unchanged model, others use `integrations.diffusers`. {cut}. {source}. "
        f"Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for model in results["models"]:
        base = model["rows"]["torch"]
        for name, row in model["rows"].items():
            call, attention = row["call"], row["attention"]
            values = (
                f"{model['case']}, {'x'.join(map(str, model['grid']))}",
                name,
                f"{call:.4g}",
                f"{base['call'] / call:.2f}x",
                f"{attention:.3g}",
                f"{base['attention'] / attention:.2f}x",
            )
            found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
