"""The study that trains with skipped tiles: what it measures, and that training skips."""

import pytest
import torch

import sparse_fmha
from benchmarks.cases import small_model
from benchmarks.harness import report
from benchmarks.studies import skip_training as study
from benchmarks.tables import skip_training as page

SIZE = {"heads": 2, "heads_kv": 1, "dim": 32}


def model_and_texts(number):
    """A model without training, and texts of long runs of one token: near keys have the largest
    scores, so far tiles are skipped."""
    runs = torch.randint(128, (number, 9), device="cpu").repeat_interleave(128, 1)
    return small_model.make(SIZE, "cpu", 0), runs[:, :1025]


def test_tiny(tmp_path):
    out = tmp_path / "results.json"
    assert study.main(["--tiny", "--out", str(out)]) == 0
    results = report.load(out)
    assert {row["model"] for row in results["rows"]} == {page.BEFORE, page.DENSE, page.SKIPPING}
    assert len(results["rows"]) == 2 + 3 * len(study.SPARSITIES)
    for row in results["rows"]:
        assert 0 <= row["right"] <= 1
        assert 0 <= row["skipped"] < 1
        assert (row["threshold"] == 0) == (row["wanted"] == 0)
    assert len(page.rows(results)) == len(results["rows"])


def test_a_threshold_is_the_least_that_skips_the_share():
    model, texts = model_and_texts(2)
    wanted = study.tried(model, texts, 0.9)["skipped"] / 2
    assert wanted > 0
    found = study.threshold_for(model, texts, wanted)
    assert study.tried(model, texts, found)["skipped"] >= wanted
    assert study.tried(model, texts, found / 1.01)["skipped"] < wanted


def test_counts_of_skipped_tiles():
    model, texts = model_and_texts(1)
    q, k, v = model.layers[0].project(model.start(texts[:, :-1]).detach())
    attend = study.Skipping(0.5)
    with torch.no_grad():
        out = attend(q, k, v)
        expected, stats = sparse_fmha.attention(
            q, k, v, causal=True, skip_threshold=0.5, return_stats=True
        )
    assert torch.equal(out, expected)
    assert attend.sparsity == int(stats.skipped.sum()) / int(stats.visited.sum()) > 0


def test_training_skips():
    """Gradients are those of attention that skips: they differ from dense attention's."""
    gradients = []
    for attend in (small_model.dense, study.Skipping(0.0), study.Skipping(0.9)):
        torch.manual_seed(0)
        model, text = model_and_texts(1)
        small_model.loss_of(model, text, attend)[0].backward()
        gradients.append(model.layers[0].qkv.weight.grad)
    dense, zero, skipping = gradients
    assert (zero - dense).norm() < 1e-4 * dense.norm()
    assert (skipping - dense).norm() > 1e-3 * dense.norm()


@pytest.mark.parametrize("lengths", [[64], [32, 64, 64]])
def test_losses_of_each_step(lengths):
    generator = torch.Generator("cpu").manual_seed(0)
    model = small_model.make(SIZE, "cpu", 0)
    assert len(small_model.fit(model, lengths, generator)) == len(lengths)


@pytest.mark.parametrize("length", [100, 512, 513, 5000, 16384])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_lengths_grow(length, steps):
    found = small_model.growing(length, steps)
    assert len(found) == steps
    assert found == sorted(found)
    assert found[-1] <= length
    if steps == 100:
        assert found[:50] == [min(length, 512)] * 50
        assert found[-10:] == [length] * 10


def test_a_model_that_has_not_learned():
    with pytest.raises(RuntimeError, match=r"not learned to look back: a loss of 4\.85 after 2"):
        small_model.learned([5.4, 4.85])
    small_model.learned([5.4, 1.5])
