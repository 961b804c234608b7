"""The study of listed queries: which pairs a rate counts, and its table."""

import pytest
import torch

from benchmarks.harness import report
from benchmarks.studies import query_rows as study
from benchmarks.tables import query_rows as table


def test_ops_of_a_case_see_the_pairs_that_are_counted():
    """A value of 1 with equal scores: exp(lse) is the number of keys that a query sees."""
    q = torch.zeros(1, 640, 2, 64)
    v = torch.randn(1, 640, 2, 64, generator=torch.Generator().manual_seed(1))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("attention", "block_sparse_attention", "row_attention"):
            whole = getattr(study.sparse_fmha, name)

            def counted(*args, whole=whole, **given):
                out, lse = whole(*args, **given, return_lse=True)
                seen.append(lse.double().exp().sum().item())
                return out

            patch.setattr(study.sparse_fmha, name, counted)
        found = study.cases(q, q, v, torch.Generator().manual_seed(0))
        assert list(found) == ["all keys", "block lists", "causal, some", "causal, all"]
        for ops in found.values():
            outs = {name: op() for name, (op, _) in ops.items()}
            for pairs in (pairs for _, pairs in ops.values()):
                assert seen.pop(0) == pytest.approx(pairs, rel=1e-4)
            assert outs[study.GATHERED].shape == q.shape
    torch.testing.assert_close(outs[study.GATHERED], outs[study.CONTIGUOUS])  # a permutation


def test_run_and_table(tmp_path):
    out = tmp_path / "results.json"
    assert study.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    results = report.load(out)
    ms = {(row["case"], row["op"]): row["ms"]["median"] for row in results["rows"]}
    lines = table.rows(results)
    cases = [line["case"] for line in lines]
    assert cases[:2] == ["D64 512 all keys", "D64 512 block lists"]
    assert "D256 512 all keys" in cases
    assert not any(case.startswith("D256") and "causal" in case for case in cases)
    of = "d64/512/causal, all"
    expected = ms[of, study.CONTIGUOUS] / ms[of, study.GATHERED]
    line = lines[cases.index("D64 512 causal, all")]
    assert float(line["rate relative to one piece"]) == pytest.approx(expected, abs=0.006)
    expected = ms[of, study.LISTS] / ms[of, study.GATHERED]
    assert float(line["to one piece by lists"]) == pytest.approx(expected, abs=0.006)
    assert lines[0]["to one piece by lists"] == ""
    assert table.caption(results, "SOURCE").count("SOURCE") == 1
