"""The table of the newest run of benchmarks.studies.skipping_gradients."""

from __future__ import annotations

from benchmarks.tables.backward import by_case

TITLE = "Gradients of calls that skip"
DEVICE = "cuda"
ALL = "backward, none skipped"
BACKWARD, TWO = "backward", "backward, two kernels"
FORWARD, SAVES = "forward", "forward that saves"
COLUMNS = (
    "case", "skipped", "backward, none skipped, ms", "backward, ms", "over none skipped",
    "two kernels, over none skipped", "forward, ms", "forward that saves, ms", "error of dq",
)  # fmt: skip


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "Backward passes of calls that skip key tiles, beside those of the same calls that skip "
        "none. Two kernels run under `torch.use_deterministic_algorithms(True)`. A forward pass "
        "that saves keeps its choices for the gradients. The error is that of the gradient of q of "
        "a small problem against fp64, relative to its largest element. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for case, ops in by_case(results).items():
        line = {"case": case, "skipped": f"{ops[BACKWARD]['skipped']:.0%}"}
        for op in (ALL, BACKWARD, FORWARD, SAVES):
            if op in ops:
                line[f"{op}, ms"] = f"{ops[op]['ms']['median']:.3g}"
        line["over none skipped"] = f"{ops[BACKWARD]['ratio']:.2f}x"
        if TWO in ops:
            line["two kernels, over none skipped"] = f"{ops[TWO]['ratio']:.2f}x"
        if ops[BACKWARD]["error"] is not None:
            line["error of dq"] = f"{ops[BACKWARD]['error']:.1e}"
        found.append(line)
    return found
