"""Memory of builders: bytes that torch's allocator hands out beside the mask, not time."""

import json

import pytest

from benchmarks.studies import builders
from benchmarks.tables import builders as page

MILLION = [
    "streaming_llm",
    "longformer, window",
    "bigbird, no global block",
    "power_attention",
    "BiFormerLayout",
    "anchor_attention's near blocks",
    "minference_block_sparse",
    "token_top_k_mask",
    "BlockMask.from_documents",
    "BlockMask.from_indices",
]
# Some with lists as wide as there are blocks, where these take a few MB.
SHORTER = ["longformer, a global block", "bigbird", "s2_attention", "moa", "BlockMask.from_blocks"]
SHORTER += ["flexprefill_query_aware", "SeerAttentionGate.mask"]


@pytest.mark.parametrize(
    ("name", "tokens"), [*((n, "1M") for n in MILLION), *((n, "128k") for n in SHORTER)]
)
def test_peak_is_at_most_three_masks(name, tokens):
    build = builders.CASES[name].prepare(builders.LENGTHS[tokens])
    size = builders.tensor_bytes(build())
    peak = builders.peak_bytes(build)
    assert size <= peak <= 3 * size


def test_peak_counts_what_is_there_together():
    import torch

    def build():
        first = torch.zeros(1000, dtype=torch.int64, device="cpu")
        second = first + 1
        del first
        return second + 1

    assert 16000 <= builders.peak_bytes(build) < 24000


def test_quick_run(tmp_path, capsys):
    builders.main(["--quick", "--case", "power_attention", "--out", str(tmp_path / "made.json")])
    assert "power_attention" in capsys.readouterr().out
    results = json.loads((tmp_path / "made.json").read_text())
    (case,) = results["cases"]
    assert (case["name"], case["tokens"]) == ("power_attention", "16k")
    assert case["seconds"] > 0
    assert 0 < case["mask_bytes"] <= case["peak_bytes"]
    assert {"commit", "device", "versions"} <= results.keys()


def test_page_table():
    case = {"name": "a", "seconds": 0.0123, "mask_bytes": 2_000_000, "peak_bytes": 3_000_000}
    cases = [case | {"tokens": "16k"}, case | {"tokens": "1M", "mask_bytes": 1_000_000}]
    assert page.rows({"cases": cases}) == [
        {"builder": "a", "16k": "0.012 s, 2.0 MB, 1.5x", "1M": "0.012 s, 1.0 MB, 3.0x"}
    ]


def test_what_is_not_run_is_said(tmp_path):
    path = tmp_path / "made.json"
    builders.main(["--case", "power_attention", "--calls", "1", "--out", str(path)])
    assert [case["tokens"] for case in json.loads(path.read_text())["cases"]] == list(
        builders.LENGTHS
    )
    for name, case in builders.CASES.items():
        assert bool(case.why) == (case.most != "1M"), name


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        builders.main(["--calls", "0"])
    assert "--calls: must be at least 1, got 0" in capsys.readouterr().err
