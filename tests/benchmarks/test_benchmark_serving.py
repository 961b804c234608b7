"""The study of methods of decode and packed calls: what its ops compute, and its table."""

import pytest
import torch

from benchmarks.cases import decode, packed, serving
from benchmarks.harness import report
from benchmarks.studies import serving as study
from benchmarks.tables import serving as table
from sparse_fmha import varlen_attention

TINY = study.SIZES["tiny"]


@pytest.fixture(scope="module")
def methods():
    size = 4 * TINY["batch"] * TINY["length"] * TINY["heads"][1] * decode.DIM * 4
    cache = decode.Cache(size // 2, "cpu", torch.float32, 0)
    return serving.methods(TINY["length"], TINY["batch"], TINY["heads"], cache)


def test_a_method_and_its_choice(methods):
    everything, named = methods
    names = ["Quest", "SeerAttention-R", "S2-Attention", "PowerAttention", "MoA", "SnapKV"]
    assert list(named) == names
    shape = (TINY["batch"], 1, TINY["heads"][0], decode.DIM)
    for call in (everything, *(method.step for method in named.values())):
        out = call()
        assert out.shape == shape
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("Quest", 3, 4), ("SeerAttention-R", 3, 4), ("S2-Attention", 16, 20)],
)
def test_blocks_that_are_read(methods, name, least, most):
    """A tenth of 32 blocks of 64 keys; Quest's newest page is one more."""
    counts = methods[1][name].choice()[1]
    assert counts.min() >= least
    assert counts.max() <= most


def test_so_many_runs_are_low_and_the_first_is_not():
    case = packed.PackedCase("prefill", "", (6400, 640, 1280))
    given = serving.shaped(packed.sequences(case, "cpu", torch.float32, 0), 50, 1)
    lists = given.cu_q, given.cu_k, *given.bounds
    rows = [given.q, given.k, given.v]
    out = varlen_attention(*rows, *lists, causal=True, skip_threshold=serving.THRESHOLD)
    exact = varlen_attention(*rows, *lists, causal=True)
    torch.testing.assert_close(out, exact, atol=1e-3, rtol=0)
    scores = (given.q[0, 0] @ given.k[:, 0].T) * packed.DIM**-0.5
    runs = scores.unflatten(0, (-1, serving.RUN)).mean(1)
    assert runs[[0, 10, 11]].gt(3).all()
    assert 2 <= runs.lt(-3).sum() <= 9


@pytest.mark.parametrize("group", ["prefill", "grids"])
def test_gradients_of_both_ways(group):
    case = next(case.tiny() for case in packed.CASES if case.group == group)
    ops = serving.gradients(case, "cpu", torch.float32)
    for x, y in zip(*(op() for op in ops), strict=True):
        assert x.abs().sum() > 0
        torch.testing.assert_close(x, y)


def test_run_and_table(tmp_path):
    out = tmp_path / "results.json"
    assert study.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    results = report.load(out)
    ms = {(row["case"], row["op"]): row["ms"]["median"] for row in results["rows"]}
    lines = table.rows(results)
    by = {(line["case"], line["op"]): line for line in lines}
    line = by["2x2k", "Quest"]
    assert float(line["times as fast"]) == pytest.approx(
        ms["2x2k", table.ALL] / ms["2x2k", "Quest"], abs=0.006
    )
    choice = ms["2x2k", "Quest" + table.CHOICE]
    assert float(line["of which the choice"]) == pytest.approx(1e3 * choice, rel=1e-3)
    once = ms["2x2k", "SnapKV"] + ms["2x2k", "SnapKV" + table.CHOICE] / table.ANSWER
    assert float(by["2x2k", "SnapKV"]["us"]) == pytest.approx(1e3 * once, rel=1e-3)
    case = "causal, 32k to 512"
    fast = ms[case, table.LOOP] / ms[case, table.PACKED]
    of_gradients = by[f"{case}, gradients", table.PACKED]
    assert float(of_gradients["times as fast"]) == pytest.approx(fast, abs=0.006)
    assert len(lines) == 1 + 6 + 3 * 2 + 2
    assert table.caption(results, "SOURCE").count("SOURCE") == 1
