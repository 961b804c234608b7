"""The study of head dim 32 at its tiny size, and the ratio that it prints."""

import json

from benchmarks.studies import narrow_heads


def test_tiny(tmp_path):
    out = tmp_path / "narrow.json"
    assert narrow_heads.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["head_dim"] for row in rows] == [32, 64] * len(narrow_heads.CASES)
    for narrow, wide in zip(rows[::2], rows[1::2], strict=True):
        assert narrow["case"] == wide["case"]
        assert 2 * narrow["bytes"] == wide["bytes"] > 0
        assert narrow["ms"]["median"] > 0


def row(op, dim, ms):
    return {"case": "full 2k", "op": op, "head_dim": dim, "bytes": dim * 1_000_000,
            "ms": {"median": ms, "p10": ms, "p90": ms}}  # fmt: skip


def test_ratios_are_of_one_op():
    rows = [row("sm80", 32, 3.0), row("peer", 32, 1.0), row("sm80", 64, 3.3), row("peer", 64, 2.0)]
    ours, peer = narrow_heads.table(rows).splitlines()[-2:]
    assert ours.split() == ["full", "2k", "sm80", "3", "3.3", "1.10", "32", "64"]
    assert peer.split() == ["full", "2k", "peer", "1", "2", "2.00", "32", "64"]
