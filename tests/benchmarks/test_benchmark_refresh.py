"""benchmarks/refresh.sh, which needs a GPU: what it names exists, and what it says without one."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cases.catalogue import select
from benchmarks.peers.registry import PEERS
from benchmarks.tables.readme import FOLDERS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "refresh.sh"
TEXT = SCRIPT.read_text()


def test_it_measures_every_table():
    assert {*re.findall(r"\bstudy (\w+)", TEXT)} | {"scaling", "builders"} >= {*FOLDERS}
    globs = re.findall(r"--case '([^']+)'", TEXT)
    assert len(select("cuda", globs, False)) == len(select("cuda", [], False))
    listed = ",".join(re.findall(r"\$\(peers ([\w,]+)\)", TEXT)).split(",")
    assert {*listed} <= {*PEERS["cuda"]}


@pytest.mark.parametrize(
    ("study", "options"),
    [("diffusion", ["--repeats", "3"]), ("host_time", ["--dtype", "bfloat16"])],
)
def test_studies_take_their_options(study, options):
    assert f"study {study} {' '.join(options)}" in TEXT
    importlib.import_module(f"benchmarks.studies.{study}").parser().parse_args(options)


def test_what_it_says_without_a_gpu(monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for steps, words in ((["grid"], "unknown step grid; there are sequences "), ([], "error: ")):
        done = subprocess.run([SCRIPT, *steps], capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr
