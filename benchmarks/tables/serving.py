"""The table of the newest run of benchmarks.studies.serving."""

from __future__ import annotations

TITLE = "Methods of decode and packed calls"
DEVICE = "cuda"
DECODE, SKIP, GRADIENTS = "decode", "skip", "gradients"
ALL, CHOICE = "all keys", ", the choice"  # the latter after the name of a method
PACKED, LOOP, PLAIN = "packed", "one call each", "packed, no threshold"
ONCE = "SnapKV"  # makes its choice once for a prompt
ANSWER = 256  # tokens, over which a choice that is made once is spread
COLUMNS = ("case", "op", "us", "of which the choice", "beside", "times as fast")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        f"A step of decode, {s['batch']} requests of {s['length'] // 1024}k tokens, "
        f"{s['heads'][0]}/{s['heads'][1]} heads, D=128, bfloat16, as one CUDA graph: the newest "
        "key is taken into what the method keeps, keys are chosen and attended to. Quest, "
        "SeerAttention-R and SnapKV read 10% of the keys, MoA 15% on average, S2-Attention and "
        "PowerAttention as published. SnapKV chooses once for a prompt; a step has its share of an "
        f"answer of {ANSWER} tokens. Then packed causal prompts of 32k to 512 tokens with a skip "
        "threshold of 0.01, where so many percent of the runs of 640 keys can be skipped, beside "
        "no threshold; and forward and backward pass of packed calls, beside one call each. "
        f"{source}. Times are the median of {s['iterations']}."
    )


def rows(results: dict) -> list[dict[str, str]]:
    ms: dict[tuple[str, str], dict[str, float]] = {}
    for row in results["rows"]:
        of_case = ms.setdefault((row["group"], row["case"]), {})
        of_case[row["op"]] = row["ms"]["median"]
    found = []
    for (group, case), times in ms.items():
        if group == DECODE:
            found += _decode(case, times)
            continue
        base = LOOP if group == GRADIENTS else PLAIN
        for op in times:
            if op != base:
                name = f"{case}, gradients" if group == GRADIENTS else case
                found.append(_line(name, op, times[op], "", base, times[base]))
    return found


def _decode(case: str, times: dict[str, float]) -> list[dict[str, str]]:
    lines = [_line(case, ALL, times[ALL], "", "", 0.0)]
    for op, ms in times.items():
        choice = times.get(op + CHOICE)
        if choice is not None:
            once = op == ONCE
            whole = ms + choice / ANSWER if once else ms
            part = f"{1e3 * choice:.4g}" + (" for a prompt" if once else "")
            lines.append(_line(case, op, whole, part, ALL, times[ALL]))
    return lines


def _line(case: str, op: str, ms: float, choice: str, base: str, base_ms: float) -> dict[str, str]:
    times = f"{base_ms / ms:.2f}" if base else ""
    values = case, op, f"{1e3 * ms:.4g}", choice, base, times
    return dict(zip(COLUMNS, values, strict=True))
