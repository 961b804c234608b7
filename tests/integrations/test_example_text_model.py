"""The example with a text model runs, and its dense way is torch's."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "text_model.py"


def test_it_runs(capsys):
    namespace = runpy.run_path(str(EXAMPLE))
    namespace["main"](["--tokens", "512"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    errors = {line[0]: float(line[-1]) for line in lines}
    assert errors["sdpa"] == 0
    assert errors["sparse_fmha"] < 1e-5
    assert set(errors) == {"sdpa", "sparse_fmha", "sparse_by_layer"}
