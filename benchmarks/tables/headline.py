"""The README's table: at most ten rows of the newest results, those that are lost among them."""

from __future__ import annotations

from benchmarks.harness.names import OURS
from benchmarks.tables.markdown import lines_of, source
from benchmarks.tables.published import NATTEN_MS
from benchmarks.tables.rates import best_peer, by_op

COLUMNS = ("case", "ms", "fastest other", "speed relative to it")

# By kind of case: its name in the results, and what the README calls it.
CASES = {
    "sequence": {
        "fmha/d128/full/16k": "full attention, 16k tokens, head dim 128",
        "fmha/d256/causal/16k": "causal attention, 16k tokens, head dim 256",
    },
    "grid": {
        "na/flux/s1": "FLUX: window 80x80 of 256x256, stride 1",
        "na/hunyuan/s16x8x8": "HunyuanVideo: window 18x24x24 of 30x48x80, stride 16x8x8",
    },
    "blocks": {
        "bs/128x128/10": "10% of blocks of 128x128, 32k tokens",
        "bs/64x64/5": "5% of blocks of 64x64, 32k tokens",
    },
    "skip": {
        "skip/causal-64k/75": "causal, 64k tokens, {skipped} of tiles skipped",
        "skip/causal-64k/10": "causal, 64k tokens, {skipped} of tiles skipped",
    },
}
# Of whole models: the variant, and what the README calls both.
CALLS = {
    "hunyuan-video-720p": ("gna-hunyuanvideo", "HunyuanVideo, window 18x24x24, stride 16x8x8"),
    "wan-14b-720p": ("sol-comfyui", "Wan 2.1 14B, Sol-Attn"),
}


def line(what: str, ms: float, other: str, other_ms: float) -> dict[str, str]:
    """A row; a speed that is lost stands out."""
    speed = f"{other_ms / ms:.2f}x"
    values = (what, f"{ms:.3g}", other, speed if other_ms >= ms else f"**{speed}**")
    return dict(zip(COLUMNS, values, strict=True))


def row_of(case: dict, what: str, l2: str) -> dict[str, str] | None:
    """Beside the published time of the same window, else the fastest peer of the same run; None
    without either."""
    runs = by_op(case, l2)
    published = NATTEN_MS.get(case["name"])
    peer = ("NATTEN, published", published) if published else best_peer(runs)
    if peer is None:
        return None
    ours = runs[OURS]
    what = what.format(skipped=f"{100 * ours.get('skipped_tiles', 0):.0f}%")
    return line(what, ours["ms"]["median"], *peer)


def call_of(model: dict, blocks: int) -> dict[str, str] | None:
    """Of a whole model cut to `blocks` blocks of each kind, not compiled; None for those that are
    not shown."""
    variant, what = CALLS.get(model["case"], ("", ""))
    rows = model["rows"]
    calls = {n: row["eager"]["call"] for n, row in rows.items() if "call" in row.get("eager", {})}
    if not {variant, "torch"} <= calls.keys():
        return None
    cut = f"{sum(min(blocks, n) for n in model['blocks'])} of {sum(model['blocks'])} blocks"
    return line(f"{what}: the whole call, {cut}", calls[variant], "torch", calls["torch"])


def table(by_kind: dict[str, dict], models: dict | None) -> str | None:
    """Of the newest results on a GPU by kind of case, and of whole models; None without any."""
    rows, sources = [], []
    for kind, names in CASES.items():
        results = by_kind.get(kind)
        if results is None:
            continue
        l2 = results["settings"]["l2"][0]
        cases = {case["name"]: case for case in results["cases"]}
        found = (row_of(cases[name], what, l2) for name, what in names.items() if name in cases)
        rows += filter(None, found)
        sources.append(source(results))
    if models:
        blocks = models["settings"]["blocks"]
        order = sorted(models["models"], key=lambda m: [*CALLS, m["case"]].index(m["case"]))
        found = list(filter(None, (call_of(model, blocks) for model in order)))
        rows += found
        sources += [f"whole calls {source(models)}"] * bool(found)
    if not rows:
        return None
    caption = (
        "Forward, bfloat16, whole ops, cold L2 cache; bold: slower than the other kernel. "
        f"{'; '.join(dict.fromkeys(sources))}."
    )
    return lines_of(caption, COLUMNS, rows)
