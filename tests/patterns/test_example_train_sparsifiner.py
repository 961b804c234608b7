"""examples/train_sparsifiner.py: training makes the predictor choose the keys that count."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_sparsifiner.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_training_finds_the_keys_that_count(example):
    losses, found = example["trained"](50, 0)
    for name in ("dense", "phase one", "phase two"):
        values = losses[name]
        assert sum(values[-10:]) < 0.9 * sum(values[:10]), name
    assert found["accuracy, dense"] > 0.9
    assert found["accuracy, keys of untrained predictors"] < 0.6  # a quarter of the keys
    assert found["accuracy, chosen keys"] > found["accuracy, keys of untrained predictors"] + 0.2
    assert found["probability, keys of untrained predictors"] < 0.4
    assert found["probability, chosen keys"] > 0.5


def test_only_chosen_keys_reach_the_class_token(example):
    """The model with predictors is the dense model with a mask of what they choose."""
    torch.manual_seed(1)
    model = example["Transformer"]()
    predictor = example["SparsifinerPredictor"](65, 2, 32, dense_rows=0)
    images, _ = example["drawn"](3, torch.Generator().manual_seed(2))
    logits, tokens, ((q, k),) = model(images, [predictor])
    layer = model.layers[0]
    x = torch.cat([model.start.expand(3, -1, -1), model.embed(images)], 1)
    v = layer.project(x)[2]
    seen = predictor.mask(q, k).to_dense()
    assert (seen.sum(-1) == 17).all()  # a quarter of 65, rounded up
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 32**-0.5
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = layer.finish(x, torch.einsum("bhij,bjhd->bihd", shares, v))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, model.head(expected[:, 0]), atol=1e-5, rtol=1e-4)
