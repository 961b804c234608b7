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
            if isinstance(frontier.METHODS[name], frontier.Whole):
                assert sparse["lost"] is denser["lost"] is None
            elif denser["sparsity"] < sparse["sparsity"] - 0.02:
                assert denser["lost"] <= sparse["lost"] + 1e-6, name
        assert all(-1e-6 <= (row["lost"] or 0) <= 1 for row in own)
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


@pytest.mark.parametrize("name", ["token-sparse", "grid heads", "anchor"])
def test_pairs_of_methods_without_a_mask(name):
    """The share that is stated is that of the pairs whose values reach the output."""
    length, budget = 2200, {"token-sparse": 0.5, "grid heads": 8, "anchor": -1.0}[name]
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, length, 1, 16, generator=generator) for _ in range(2))
    attend = frontier.METHODS[name].attend
    v = torch.zeros(1, length, 1, 16)
    share = attend(q, k, v, budget)[1]()
    sampled = torch.randint(length, (320,), generator=generator)
    seen = torch.zeros(length, 320)
    for n in range(0, 320, 16):  # one channel shows which queries see one key
        some = sampled[n : n + 16]
        v = torch.zeros(1, length, 1, 16)
        v[0, some, 0, torch.arange(len(some))] = 1
        seen[:, n : n + 16] = (attend(q, k, v, budget)[0][0, :, 0, : len(some)] > 0).float()
    of_keys = seen.sum(0)
    expected = of_keys.sum() / (length - sampled.float()).sum()
    assert share == pytest.approx(expected.item(), abs=0.03)


def test_a_trained_model(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--iterations", "1", "--inputs", "trained", "--steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "METHODS", {"psa": frontier.METHODS["psa"]})
        assert study.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["settings"]["inputs"] == "trained"
    assert len(found["settings"]["losses"]) == 2
    sparsities = [row["sparsity"] for row in found["rows"]]
    assert sparsities == sorted(sparsities, reverse=True)
