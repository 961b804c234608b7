"""The study of reductions of scores: what a rate counts."""

import pytest

from benchmarks.harness import report
from benchmarks.studies import score_sums as study


def test_tiny(tmp_path):
    out = tmp_path / "results.json"
    assert study.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = {(row["case"], row["op"]): row for row in report.load(out)["rows"]}
    pairs = {"full": 2 * 256**2, "causal": 256 * 257}
    for (case, op), row in rows.items():
        if "last" in case:
            continue
        products = 1 if "lse given" in op else 2
        done = products * 2 * pairs[case.rpartition("/")[2]] * 64
        assert row["tflops"] == pytest.approx(done / row["ms"]["median"] / 1e9)
        assert row["of_dense"] == pytest.approx(row["tflops"] / rows[case, "dense"]["tflops"])
    assert rows["d128/512/last 64", "columns"]["of_dense"] is None
