"""The training example: torch's attention and ours give the same curve, a window another."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train_diffusion.py"))
TORCH, OURS, WINDOW = (EXAMPLE[name] for name in ("TORCH", "OURS", "WINDOW"))


@pytest.fixture(scope="module")
def small():
    return dataclasses.replace(EXAMPLE["TINY"], side=12, window=3, dim=32, layers=1, batch=2)


def test_it_runs(capsys, tmp_path, monkeypatch, small):
    monkeypatch.setitem(EXAMPLE["main"].__globals__, "TINY", small)
    path = tmp_path / "curves.png"
    assert not EXAMPLE["main"](["--steps", "60", "--out", str(path)])
    head, _, *rows, last = capsys.readouterr().out.splitlines()
    assert head == "6x6 tokens, 1 layers, 60 steps, cpu"
    assert str(path) in last
    found = {}
    for row in rows:
        name, *numbers = re.split(r" {2,}", row.removesuffix(" s"))
        found[name] = [float(number) for number in " ".join(numbers).split()]
    assert list(found) == [TORCH, OURS, f"{WINDOW} 3x3"]
    (start, end, _), ours, window = found.values()
    assert end < 0.7 * start
    assert ours[2] < 1e-4 < window[2]
    with Image.open(path) as picture:
        assert len(picture.getcolors(1 << 20)) > 10


def test_a_window_of_the_whole_grid_trains_as_dense_attention(small):
    whole = dataclasses.replace(small, window=small.grid)
    curves = [EXAMPLE["train"](n, whole, 5, 1, "cpu")[0] for n in (TORCH, OURS, WINDOW)]
    for curve in curves[1:]:
        assert max(EXAMPLE["distances"](curve, curves[0])) < 1e-5


def test_all_start_with_the_same_weights(small):
    weights = []
    for name in (TORCH, OURS, WINDOW):
        torch.manual_seed(3)
        weights.append(EXAMPLE["DiffusionTransformer"](name, small, "cpu").state_dict())
    first, *others = weights
    for other in others:
        assert list(other) == list(first)
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_tokens_are_the_crops(small):
    """A batch put together again is a part of the photograph."""
    photo = EXAMPLE["photo"]
    whole = 2 * photo.load(None, small.side, 1 << 30, None) - 1
    ((crops, noise, share),) = EXAMPLE["batches"](small, 1, 5, "cpu")
    assert crops.shape == noise.shape == (2, 6, 6, 12)
    assert share.shape == (2,)
    for tokens in crops:
        crop = tokens.unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).reshape(3, 12, 12)
        places = whole.unfold(1, 12, 1).unfold(2, 12, 1)
        assert (places == crop[:, None, None]).all(-1).all(-1).all(0).any()
