"""The study of backward passes at its tiny size."""

import json
import math

import pytest
import torch
from torch._inductor.exc import InductorError

from benchmarks.harness.names import UnavailableError
from benchmarks.peers import flex as flex_peer
from benchmarks.studies import backward
from benchmarks.tables import backward as page


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


def test_page_table():
    def row(case, op, ms, error):
        return {"case": case, "op": op, "ms": {"median": ms}, "useful_flops": 2e12, "error": error}

    rows = [row("a", "sparse_fmha", 5.0, 4e-3), row("a", "cuDNN", 4.0, None)]
    both, alone = page.rows(
        {
            "rows": [
                *rows,
                row("b", "sparse_fmha", 10.0, 2e-3),
                row("b", "FlexAttention", 30.0, None),
            ]
        }
    )
    assert tuple(both.values()) == ("a", "5", "400", "0.80x (4 ms)", "4.0e-03")
    assert alone["relative to FlexAttention"] == "3.00x (30 ms)"
    assert (alone["case"], alone["TFLOP/s"]) == ("b", "200")


@pytest.mark.parametrize("case", backward.CASES, ids=lambda case: case.name)
def test_peers_have_the_same_work(case):
    other = case.of_peers("cpu", torch.float32)
    shape = other.batch, other.length, other.heads_q, other.head_dim
    assert shape == (case.batch, math.prod(case.grid), case.heads, case.head_dim)
    assert other.mechanism == (
        "neighborhood" if case.window else "block_sparse" if case.blocks
        else "causal" if case.causal else "dense"
    )  # fmt: skip
    assert other.visible_pairs == case.pairs()


def test_cases_that_flex_attention_has_no_kernel_for(monkeypatch):
    def fail(*_):
        raise InductorError(RuntimeError("No choices to select. Provided reason: none"), None)

    monkeypatch.setattr(flex_peer, "flex", fail)
    case = next(case for case in backward.CASES if case.name == "lists 64x64").tiny()
    *inputs, dout = backward.problem(case, "cpu", torch.float32, 0)
    with pytest.raises(UnavailableError, match=r"^RuntimeError: No choices to select$"):
        backward.flex_backward(case, inputs, dout, torch.float32)


def test_chosen_cases(tmp_path):
    out = tmp_path / "backward.json"
    assert backward.main(["--tiny", "--case", "1-D", "--iterations", "1", "--out", str(out)]) == 0
    assert {row["case"] for row in json.loads(out.read_text())["rows"]} == {"1-D"}
