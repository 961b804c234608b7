"""The study of methods at several budgets: what its figures are."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from sparse_fmha import reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cases import frontier, stripes  # noqa: E402
from benchmarks.studies import frontier as study  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    arguments = ["--tiny", "--iterations", "1", "--plot", str(folder / "picture.png")]
    assert study.main([*arguments, "--out", str(folder / "out.json")]) == 0
    assert (folder / "picture.png").stat().st_size > 10_000
    return json.loads((folder / "out.json").read_text())["rows"]


def test_more_pairs_lose_less(rows):
    """Of one method, a mask with clearly more pairs loses no more probability."""
    assert {row["method"] for row in rows} == set(frontier.METHODS)
    for name in frontier.METHODS:
        own = [row for row in rows if row["method"] == name]
        assert len(own) == len(frontier.METHODS[name].budgets)
        for sparse, denser in itertools.pairwise(own):
            if denser["sparsity"] < sparse["sparsity"] - 0.02:
                assert denser["lost"] <= sparse["lost"] + 1e-6, name
        assert all(-1e-6 <= row["lost"] <= 1 for row in own)
        assert all(-1e-6 <= row["sparsity"] < 1 for row in own)


def test_figures_of_a_mask(rows):
    """Sparsity and lost probability are those of the pairs that the dense form of the mask has."""
    q, k, v, _ = stripes.planted(
        {"length": 2048, "heads": 2, "heads_kv": 1, "dim": 128}, "cpu", torch.float32, 0
    )
    causal = torch.ones(2048, 2048, dtype=torch.bool).tril()
    _, whole = reference.attention(q, k, v, causal)
    for name in ("streaming-llm", "vertical-slash"):
        method = frontier.METHODS[name]
        seen = method.make(q, k, method.budgets[1]).to_dense() & causal
        _, lse = reference.attention(q, k, v, seen)
        row = [row for row in rows if row["method"] == name][1]
        share = seen.double().mean((-2, -1)).mean() / causal.double().mean()
        assert row["sparsity"] == pytest.approx(1 - share.item(), abs=1e-6)
        assert row["lost"] == pytest.approx(1 - (lse - whole).exp().mean().item(), abs=1e-4)
