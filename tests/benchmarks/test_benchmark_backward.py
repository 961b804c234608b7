"""The study of backward passes at its tiny size."""

import json
import math

import pytest

from benchmarks.studies import backward


def test_tiny(tmp_path, capsys):
    out = tmp_path / "backward.json"
    assert backward.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"] for row in rows} == {case.name for case in backward.CASES}
    for row in rows:
        assert row["ms"]["median"] > 0
        assert row["useful_flops"] > 0
        assert row["error"] is None or row["error"] < 1e-4
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in backward.CASES)


@pytest.mark.parametrize("case", backward.CASES, ids=lambda case: case.name)
def test_pairs(case):
    """Those that are counted are those that are visible."""
    small = case.tiny()
    _, visible = backward.attention_of(small, "cpu", 0)
    tokens = math.prod(small.grid)
    heads = visible.shape[-3] if visible.dim() > 2 else 1
    assert small.pairs() * heads == visible.expand(*visible.shape[:-2], tokens, tokens).sum()
