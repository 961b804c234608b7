"""The studies of methods and of models: what a case compares, and what the tables say."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sparse_fmha import attention, patterns

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cases import methods as cases  # noqa: E402
from benchmarks.cases import stripes  # noqa: E402
from benchmarks.studies import methods as study  # noqa: E402
from benchmarks.tables import methods as table  # noqa: E402
from benchmarks.tables import models  # noqa: E402


@pytest.mark.parametrize("name", cases.CASES)
def test_ops_of_a_case_run(name):
    """Each op has a finite result, in the layout of attention, of as many queries as the others."""
    case = cases.CASES[name].tiny()
    q, k, v = cases.tensors(case, "cpu", torch.float32, 0)
    found = {op: call() for op, call in case.ops(case, q, k, v).items()}
    assert found
    for out in found.values():
        assert out.shape[2:] == (case.heads, case.dim)
        assert out.isfinite().all()
    assert case.against in {*found, cases.DENSE, cases.FA3}


def test_grid_heads_find_the_grid_of_a_video():
    """The lines that are planted, and nearly all of the probability on them."""
    size = {"length": 2048, "heads": 4, "heads_kv": 2, "dim": 64}
    q, k, v, stride = stripes.planted_video(size, "cpu", torch.float32, 0)
    lines = patterns.mminference_grid_lines(q, k, (64, 128, 256))
    assert (lines.stride == stride).all()
    seen = attention(q, k, v, causal=True)
    out = patterns.mminference_grid_attention(q, k, v, (64, 128, 256))
    later = slice(256, None)  # the first queries have no line before them
    difference = (out - seen)[:, later].norm() / seen[:, later].norm()
    assert difference < 0.02


def test_run_and_table(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--iterations", "1", "--case", "psa", "--case", "pka", "--out", str(out)]
    assert study.main(arguments) == 0
    results = json.loads(out.read_text())
    psa = results["methods"][0]
    lines = {line["op"]: line for line in table.rows(results)}
    assert list(lines) == ["psa", "pka", "pka, captured"]  # what they are compared with has no line
    ms = {row["op"]: row["ms"]["median"] for row in psa["rows"]}
    assert lines["psa"]["measured"] == f"{ms[cases.LISTS] / ms['psa']:.2f}x"
    assert lines["psa"]["over dense"] == f"{ms['dense'] / ms['psa']:.2f}x"
    assert 0 < float(lines["psa"]["difference"]) < 1
    assert lines["pka"]["difference"] == ""  # it approximates another model's attention
    assert "16 conditions" in lines["pka"]["headline"]
    assert table.caption(results, "here").count("here") == 1


def test_without_dense(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--iterations", "1", "--case", "pka", "--against", "none"]
    assert study.main([*arguments, "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())["methods"]
    assert [row["op"] for row in found["rows"]] == ["pka", "pka, captured"]
    for line in table.rows({"methods": [found]}):
        assert line["over dense"] == line["measured"] == ""


def test_what_cannot_run_is_said(monkeypatch, tmp_path):
    """One method that raises does not stop the others, and its line has the reason."""

    def refuse(*_, **__):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(cases.patterns, "dma_attention", refuse)
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--iterations", "1", "--case", "dma", "--case", "pka"]
    assert study.main([*arguments, "--out", str(out)]) == 0
    lines = table.rows(json.loads(out.read_text()))
    assert [(line["op"], line["ms"] == "") for line in lines] == [
        ("dma", True), ("dma, captured", True), ("pka", False), ("pka, captured", False),
    ]  # fmt: skip
    assert lines[0]["headline"] == "not on this device"


def test_models_table():
    """Speedups are of the mode's first variant; errors have no line, compiled calls no share."""
    rows = {
        "torch": {"eager": {"call": 30.0, "peak_bytes": 2**21},
                  "compiled": {"call": 20.0, "peak_bytes": None}},
        "dense": {"eager": {"error": "RuntimeError: no"}},
        "window": {"eager": {"call": 15.0, "peak_bytes": 2**20},
                   "compiled": {"call": 8.0, "peak_bytes": 2**20}},
    }  # fmt: skip
    model = {"case": "m", "tokens": 7, "rows": rows, "shares": {"torch": 0.5, "window": 0.1}}
    lines = [tuple(line.values()) for line in models.rows({"models": [model]})]
    assert lines == [
        ("m", "7", "torch", "eager", "30", "1.00x", "50%", "2"),
        ("m", "7", "window", "eager", "15", "2.00x", "10%", "1"),
        ("m", "7", "torch", "compiled", "20", "1.00x", "", ""),
        ("m", "7", "window", "compiled", "8", "2.50x", "", "1"),
    ]
