"""The table of the newest run of benchmarks.studies.models."""

from __future__ import annotations

TITLE = "Calls of models in real shapes"
DEVICE = "cuda"
COLUMNS = ("model", "tokens", "variant", "mode", "call, ms", "speedup", "attention", "peak, MiB")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "One call of models of diffusers with random weights, cut to "
        f"{s['blocks']} blocks of each kind, {s['dtype']}. `torch` is the unchanged model, `dense` "
        "the same with our kernel; the others are presets or windows, in a step in which they are "
        "sparse. Attention is its share of the call; the peak is what a call allocates beside "
        f"weights and inputs. {source}. Times are the median of {s['iterations']}."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for model in results["models"]:
        for mode in ("eager", "compiled"):
            calls = {
                n: row[mode] for n, row in model["rows"].items() if "call" in row.get(mode, {})
            }
            base = next((row["call"] for row in calls.values()), None)
            for name, row in calls.items():
                share = model["shares"].get(name) if mode == "eager" else None
                peak = row["peak_bytes"]
                values = (
                    model["case"], str(model["tokens"]), name, mode, f"{row['call']:.4g}",
                    f"{base / row['call']:.2f}x", "" if share is None else f"{share:.0%}",
                    "" if peak is None else f"{peak / 2**20:.0f}",
                )  # fmt: skip
                found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
