"""The table of all cells beside their fastest peer, and the README's rows of whole models."""

import re

import pytest

from benchmarks.tables import headline, peers, rates, readme, skipping_gradients, vision

META = {
    "timestamp": "2026-01-02T00:00:00+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "device": {"type": "cuda", "name": "GPU"},
    "versions": {"torch": "2.11"},
}


def timed(**ms):
    return {op: {"median": x} for op, x in ms.items()}


def case(name, ms, skip=None):
    runs = [{"op": op, "l2": "cold", "ms": {"median": x}} for op, x in ms.items()]
    return {"name": name, "shape": {"skip": skip}, "runs": runs}


CASES = META | {
    "settings": {"l2": ["cold"]},
    "cases": [
        case("bs/a", {"matmul": 0.1, "sparse_fmha": 2.0, "flex": 3.0, "vsa": 1.0}),
        case("na/alone", {"matmul": 0.1, "sparse_fmha": 2.0, "fa3 dense": 1.0}),
        case("skip/a", {"sparse_fmha": 1.0, "sparse_fmha dense": 0.5, "fa3": 4.0}, skip=75),
    ],
}
SMALL = META | {
    "rows": [
        {"case": "small/a", "ms": timed(sparse_fmha=2.0, q64=0.1, cudnn=4.0, fa3=3.0)},
        {"case": "small/alone", "ms": timed(sparse_fmha=2.0, q64=0.1)},
    ]
}


def decoded(group, case, op, ms):
    return {"group": group, "case": case, "op": op, "ms": {"median": ms}}


DECODE = META | {
    "rows": [
        decoded("floor", "floor", "read, sum", 0.1),
        decoded("dense", "1x1k", "sparse_fmha", 1.0),
        decoded("dense", "1x1k", "own, page 64", 0.1),
        decoded("dense", "1x1k", "cudnn", 1.0),
        decoded("skip", "1x64k", "sparse_fmha", 1.0),
        decoded("skip", "1x64k", "fa3, contiguous", 2.0),
        decoded("dense", "large", "cudnn", 1.0),  # ours did not fit
    ]
}
BACKWARD = META | {
    "rows": [
        {"case": "D64", "op": op, "ms": {"median": ms}}
        for op, ms in (("sparse_fmha", 1.0), ("cuDNN", 1.5), ("FlexAttention", 1.25))
    ]
}
STUDIES = {"small": SMALL, "decode": DECODE, "backward": BACKWARD}


def test_the_worst_cell_is_first():
    caption, _, head, _, *lines = peers.table([CASES], STUDIES).splitlines()
    assert head == "| " + " | ".join(peers.COLUMNS) + " |"
    assert lines == [
        "| bs/a | 2 | fastvideo-kernel | 1 | **0.500x** |",
        "| decode/1x1k | 1 | cuDNN | 1 | 1.000x |",
        "| backward/D64 | 1 | FlexAttention | 1.25 | 1.250x |",
        "| small/a | 2 | FlashAttention-3 | 3 | 1.500x |",
        "| decode/1x64k * | 1 | FlashAttention-3, contiguous | 2 | 2.000x |",
        "| skip/a * | 1 | FlashAttention-3 | 4 | 4.000x |",
    ]
    all_cells = (0.5 * 1.25 * 1.5 * 2 * 4) ** (1 / 6)
    same_work = (0.5 * 1.25 * 1.5) ** (1 / 4)
    assert f"6 cells, 5 at 1.00 or more, geometric mean {all_cells:.3f}x" in caption
    assert "worst 0.500x (bs/a)" in caption
    assert f"these 4 cells, 3 at 1.00 or more, geometric mean {same_work:.3f}x" in caption
    assert caption.count("commit 0123456789") == 1


def test_without_cells_there_is_no_table():
    assert peers.table([], dict.fromkeys(STUDIES)) is None
    assert peers.table([CASES | {"cases": CASES["cases"][1:2]}], {}) is None


def test_dense_attention_is_no_peer_of_a_sparse_case():
    assert rates.best_peer({"fa3 dense": {"ms": {"median": 1.0}}}) is None


def test_the_page_has_each_cell_of_the_newest_results(tmp_path):
    """The repository's own: as many lines as the caption says, in order."""
    first = next(iter(readme.sections(readme.report.RESULTS)))
    title, _, caption, _, _, _, *lines = first.splitlines()
    assert title == f"## {peers.TITLE}"
    count, no_slower = map(int, re.search(r"(\d+) cells, (\d+) at 1.00", caption).groups())
    ratios = [float(line.split("|")[-2].strip(" *x")) for line in lines]
    assert len(lines) == count
    assert ratios == sorted(ratios)
    assert sum("**" not in line for line in lines) == no_slower
    for folder in ("small/", "decode/", "backward/", "fmha/", "bs/", "skip/", "na/"):
        assert any(line.startswith(f"| {folder}") for line in lines), folder


def model(name, **calls):
    rows = {variant.replace("_", "-"): {"eager": {"call": ms}} for variant, ms in calls.items()}
    return {"case": name, "blocks": [20, 1], "rows": rows}


def test_headline_of_whole_models():
    models = META | {
        "settings": {"blocks": 2},
        "models": [
            model("hunyuan-video-720p", torch=10.0, gna_hunyuanvideo=4.0),
            model("wan-14b-720p", torch=10.0, dense=4.0),  # without the variant that is shown
            model("ltx2-1080p", torch=10.0, window=4.0),
        ],
    }
    *_, last = headline.table({}, models).splitlines()
    assert last == (
        "| HunyuanVideo, window 18x24x24, stride 16x8x8: the whole call, 3 of 21 blocks "
        "| 4 | torch | 2.50x |"
    )
    assert headline.table({}, models | {"models": models["models"][1:]}) is None


def test_a_variant_that_failed_is_not_shown():
    failed = model("hunyuan-video-720p", torch=10.0)
    failed["rows"]["gna-hunyuanvideo"] = {"eager": {"error": "no memory"}}
    assert headline.call_of(failed, 2) is None


@pytest.mark.parametrize("op", ["routed, forward", "SDPA, dense, forward"])
def test_vision_table(op):
    row = {"case": "224 pixels", "op": op, "ms": {"median": 12.345}, "speedup": 0.5}
    settings = {"batches": {"224": 64}, "depths": [2, 8], "channels": 64, "iterations": 10}
    results = {"rows": [row], "settings": settings | {"l2": "cold"}}
    (line,) = vision.rows(results)
    assert tuple(line.values()) == ("64 of 224 pixels", op, "12.35", "0.50x")
    assert "(2, 8 blocks, 64 channels" in vision.caption(results, "source")


def test_table_of_gradients_that_skip():
    def row(case, op, ms, ratio, error=None):
        spread = {"median": ms}
        return {
            "case": case,
            "op": op,
            "ms": spread,
            "skipped": 0.5,
            "ratio": ratio,
            "error": error,
        }

    rows = [
        row("a", "backward, none skipped", 4.0, 1.0),
        row("a", "backward", 2.0, 2.0, 1e-3),
        row("a", "backward, two kernels", 3.0, 1.333),
        row("a", "forward", 1.0, 1.0),
        row("a", "forward that saves", 1.5, 0.667),
        row("lists", "backward, none skipped", 4.0, 1.0),
        row("lists", "backward", 2.0, 2.0),
    ]
    first, lists = skipping_gradients.rows({"rows": rows})
    assert [first[c] for c in skipping_gradients.COLUMNS] == [
        "a", "50%", "4", "2", "2.00x", "1.33x", "1", "1.5", "1.0e-03",
    ]  # fmt: skip
    assert [*lists.values()] == ["lists", "50%", "4", "2", "2.00x"]
