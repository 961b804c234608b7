"""The study of gradients with skipping at its tiny size."""

import json

from benchmarks.studies import skipping_gradients as study


def test_tiny(tmp_path, capsys):
    out = tmp_path / "skipping_gradients.json"
    assert study.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len({row["case"] for row in rows}) == len(study.CASES)
    for case in study.CASES:
        ops = {row["op"]: row for row in rows if row["case"] == case.name}
        expected = [study.ALL, study.OURS, study.TWO, study.FORWARD, study.SAVING]
        if case.mechanism == "attention":
            assert ops[study.OURS]["error"] < 1e-4
            assert (ops[study.OURS]["skipped"] > 0) == (case.percent > 0)
        else:
            expected.remove(study.TWO)
        assert list(ops) == expected
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in study.CASES)
