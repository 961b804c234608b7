"""The benchmark of whole transformers, with few tokens on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import report  # noqa: E402
from benchmarks.studies import diffusion  # noqa: E402


def test_help_needs_no_diffusers():
    command = [sys.executable, "-m", "benchmarks.studies.diffusion", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--layers" in shown
    assert "--tiny" in shown


def test_tiny(capsys, tmp_path):
    path = tmp_path / "run.json"
    arguments = ["--tiny", "--layers", "1", "--repeats", "1", "--dtype", "float32"]
    assert diffusion.main([*arguments, "--out", str(path)]) == 0
    printed, _, where = capsys.readouterr().out.rpartition("results: ")
    assert where.strip() == str(path)
    _, *tables = printed.rstrip().split("\n\n")
    assert len(tables) == len(diffusion.CASES)
    for text in tables:
        _, _, *rows = text.splitlines()
        names = [row[:16].strip() for row in rows]
        assert names == ["torch", "dense", "window", "window, stride"]
        torch_, dense, window, strided = (float(row.split()[-1]) for row in rows)
        assert torch_ == 0
        assert dense < 1e-5 < min(window, strided)
    results = report.load(path)
    assert results["versions"]["diffusers"]
    assert [model["case"] for model in results["models"]] == list(diffusion.CASES)
    for model in results["models"]:
        assert list(model["rows"]) == names
        assert model["blocks"] <= model["all_blocks"]


@pytest.mark.parametrize("name", diffusion.CASES)
def test_windows_fit_the_grids(name):
    from sparse_fmha.integrations import _diffusion_table as table
    from sparse_fmha.integrations._diffusion_layout import Layout

    for case in (diffusion.CASES[name], diffusion.tiny(diffusion.CASES[name])):
        method = table.make("neighborhood", {"window": case.window, "stride": case.stride})
        method.check(Layout(case.grid))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("wan-1.3b-480p", 1.4), ("hunyuan-video-720p", 12.8), ("flux-4096", 11.9)],
)
def test_all_blocks_are_the_published_model(name, billions):
    case = diffusion.CASES[name]
    with torch.device("meta"):
        model = case.make(case, max(case.layers))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.02)
