"""The study of methods at several budgets: what its figures are."""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_fmha import reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cases import frontier, stripes  # noqa: E402
from benchmarks.studies import frontier as study  # noqa: E402
from benchmarks.tables import frontier as table  # noqa: E402


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


BUDGETS = {"token-sparse": 0.5, "grid heads": 8, "anchor": -1.0, "dma": 0.3}


@pytest.mark.parametrize("name", ["token-sparse", "grid heads", "anchor", "dma"])
def test_pairs_of_methods_without_a_mask(name):
    """The share that is stated is that of the pairs whose values reach the output."""
    length, budget = 2200, BUDGETS[name]
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


SIZE = {"length": 2048, "heads": 2, "heads_kv": 1, "dim": 128}
OPTIONS = argparse.Namespace(iterations=1, seed=0)


@pytest.mark.parametrize(("name", "dense"), [("rectified", 1.0), ("sol", -1e9), ("dma", 2.0)])
def test_what_a_method_approximates(name, dense):
    """With a budget for all pairs it is the attention that it is compared with."""
    qkv = list(stripes.planted(SIZE, "cpu", torch.float32, 0)[:3])
    method = replace(frontier.METHODS[name], budgets=(dense,))
    (row,) = study.points(name, method, qkv, OPTIONS, "cpu")
    assert row["sparsity"] == pytest.approx(0, abs=1e-9)
    assert row["error"] < 2e-3
    assert row["causal"] == (name == "dma")


@pytest.mark.parametrize("name", ["rectified", "sol"])
def test_a_pooled_pair_counts_as_one(name):
    """Values of one block as wide as it is long: its means reach queries that do not see it."""
    qkv = list(stripes.planted(SIZE, "cpu", torch.float32, 0)[:3])
    method = frontier.METHODS[name]
    _, share = method.attend(*qkv, method.budgets[0])
    size = {"rectified": 128, "sol": 64}[name]
    seen = torch.zeros(2, 2048, 2048 // size)
    for block in range(2048 // size):
        v = torch.zeros(1, 2048, 1, 128)
        v[0, block * size : (block + 1) * size, 0, :size] = torch.eye(size)
        out = method.attend(*qkv[:2], v, method.budgets[0])[0][0, ..., :size]
        alike = (out == out[..., :1]).all(-1)  # all keys of the block have one weight
        keys = torch.where(alike, 1, size) * (out != 0).any(-1)
        seen[:, :, block] = keys.T
    assert share() == pytest.approx(seen.double().mean().item() / size, rel=0.01)


def test_a_chunk_is_compared_with_its_own_queries():
    qkv = list(stripes.planted(SIZE, "cpu", torch.float32, 0)[:3])
    name = "light-forcing"
    method = replace(frontier.METHODS[name], budgets=(0.2,))
    (row,) = study.points(name, method, qkv, OPTIONS, "cpu")
    q, k, v = qkv
    q = q[:, -256:]  # two of 16 frames
    seen = method.make(q, k, 0.2).to_dense()
    out, lse = reference.attention(q, k, v, seen)
    exact, whole = reference.attention(q, k, v, torch.ones_like(seen))
    assert row["sparsity"] == pytest.approx(1 - seen.double().mean().item(), abs=1e-6)
    assert row["lost"] == pytest.approx(1 - (lse - whole).exp().mean().item(), abs=1e-4)
    assert row["error"] == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=1e-3)


def test_the_fastest_within_an_error():
    def row(method, error, ms, causal=True):
        return {"method": method, "chosen_by": "x", "causal": causal, "sparsity": 0.5,
                "lost": None, "error": error, "ms": ms, "dense_ms": 4.0}  # fmt: skip

    rows = [row("slow", 0.0, 5.0), row("a", 0.04, 2.0), row("b", 0.04, 1.0), row("c", 0.4, 0.5)]
    lines = table.best({"rows": [*rows, row("d", 0.1, 2.0, causal=False)]})
    found = [(x["error at most"], x["pairs"], x["fastest method"]) for x in lines]
    dense = "dense attention"
    assert found == [
        ("1%", "causal", dense), ("5%", "causal", "b"), ("20%", "causal", "b"),
        ("50%", "causal", "c"), ("1%", "all", dense), ("5%", "all", dense),
        ("20%", "all", "d"), ("50%", "all", "d"),
    ]  # fmt: skip
    assert lines[1]["over dense"] == "4.00x"


def test_a_trained_model(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--iterations", "1", "--inputs", "trained", "--steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        some = {name: frontier.METHODS[name] for name in ("psa", "rectified")}
        patch.setattr(study, "METHODS", some)
        assert study.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["settings"]["inputs"] == "trained"
    assert {row["method"] for row in found["rows"]} == {"psa"}  # the model is causal
    assert len(found["settings"]["losses"]) == 2
    sparsities = [row["sparsity"] for row in found["rows"]]
    assert sparsities == sorted(sparsities, reverse=True)
