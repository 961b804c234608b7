"""The README's table: at most ten rows of the newest results, those that are lost among them."""

from __future__ import annotations

from benchmarks.harness.names import MATMUL, OURS
from benchmarks.tables.markdown import lines_of, source
from benchmarks.tables.published import NATTEN_MS
from benchmarks.tables.rates import by_op
from benchmarks.tables.sequences import PEER_NAMES

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
MODEL, CALL = "hunyuan-video-720p", "window, stride"


def line(what: str, ms: float, other: str, other_ms: float) -> dict[str, str]:
    """A row; a speed that is lost stands out."""
    speed = f"{other_ms / ms:.2f}x"
    values = (what, f"{ms:.3g}", other, speed if other_ms >= ms else f"**{speed}**")
    return dict(zip(COLUMNS, values, strict=True))


def row_of(case: dict, what: str, l2: str) -> dict[str, str]:
    """Beside the published time of the same window, else the fastest peer of the same run."""
    runs = by_op(case, l2)
    ours = runs.pop(OURS)
    what = what.format(skipped=f"{100 * ours.get('skipped_tiles', 0):.0f}%")
    if case["name"] in NATTEN_MS:
        other, other_ms = "NATTEN, published", NATTEN_MS[case["name"]]
    else:
        peers = {op: r["ms"]["median"] for op, r in runs.items() if op in PEER_NAMES}
        fastest = min(peers, key=peers.__getitem__)
        other, other_ms = PEER_NAMES[fastest], peers[fastest]
    return line(what, ours["ms"]["median"], other, other_ms)


def has_peer(case: dict, l2: str) -> bool:
    """Whether the run has something of another library to stand beside."""
    ops = {r["op"] for r in case["runs"] if r["l2"] == l2} - {OURS, MATMUL}
    return case["name"] in NATTEN_MS or bool(ops & PEER_NAMES.keys())


def table(by_kind: dict[str, dict], models: dict | None) -> str | None:
    """Of the newest results on a GPU by kind of case, and of whole models; None without any."""
    rows, sources = [], []
    for kind, names in CASES.items():
        results = by_kind.get(kind)
        if results is None:
            continue
        l2 = results["settings"]["l2"][0]
        cases = {case["name"]: case for case in results["cases"]}
        rows += [
            row_of(cases[name], what, l2)
            for name, what in names.items()
            if name in cases and has_peer(cases[name], l2)
        ]
        sources.append(source(results))
    for model in models["models"] if models else ():
        if model["case"] == MODEL:
            calls = {name: row["call"] for name, row in model["rows"].items()}
            what = (
                f"HunyuanVideo, {model['blocks']} of {model['all_blocks']} blocks, the whole call"
            )
            rows.append(line(what, calls[CALL], "torch's attention", calls["torch"]))
            sources.append(f"the whole call {source(models)}")
    if not rows:
        return None
    caption = (
        "Forward, bfloat16, whole ops, cold L2 cache; bold: slower than the other kernel. "
        f"{'; '.join(dict.fromkeys(sources))}."
    )
    return lines_of(caption, COLUMNS, rows)
