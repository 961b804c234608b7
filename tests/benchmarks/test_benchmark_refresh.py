"""benchmarks/refresh.sh, which needs a GPU: what it names exists, and what it says without one."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_fmha
from benchmarks.__main__ import main
from benchmarks.cases.catalogue import select
from benchmarks.peers import registry
from benchmarks.tables.readme import FOLDERS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "refresh.sh"
TEXT = SCRIPT.read_text()
ON_A_CPU = {"builders", "skip_training"}


def test_it_measures_every_table():
    steps = {*re.findall(r"\b(?:study |step_)(\w+)", TEXT)}
    assert steps | {"scaling"} | ON_A_CPU >= {*FOLDERS}
    globs = re.findall(r"--case '([^']+)'", TEXT)
    assert len(select("cuda", globs, False)) == len(select("cuda", [], False))
    listed = ",".join(re.findall(r"\[\w+\]=([\w,]+)", TEXT)).split(",")
    assert {*registry.LOAD} < {*listed} <= {*registry.PEERS["cuda"]}


def test_a_study_takes_its_options():
    assert 'study host_time --dtype bfloat16 --without "$WITHOUT"; }' in TEXT
    study = importlib.import_module("benchmarks.studies.host_time")
    study.parser().parse_args(["--dtype", "bfloat16", "--without", "fa3"])


def test_all_steps_but_one_are_the_default():
    (listed,) = re.findall(r"known=\((.*?)\)", TEXT, re.DOTALL)
    assert {*listed.split()} == {*re.findall(r"^step_(\w+)\(", TEXT, re.MULTILINE)}
    assert listed.split()[-1] == "scaling"  # it needs two GPUs


def test_what_it_says_without_a_gpu(monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for steps, words in ((["grid"], "unknown step grid; there are sequences "), ([], "error: ")):
        done = subprocess.run([SCRIPT, *steps], capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr


@pytest.fixture
def refresh(tmp_path):
    """Runs the script where a GPU and the library seem to be; steps print their arguments."""
    for folder in ("benchmarks", "tools"):
        tmp_path.joinpath(folder).symlink_to(SCRIPT.parents[1] / folder)
    library = tmp_path / "python" / "sparse_fmha" / "libsparse_fmha.so"
    library.parent.mkdir(parents=True)
    library.touch()
    python = tmp_path / "python3"
    python.write_text(
        "#!/usr/bin/env bash\n"
        "[[ $1 == -c ]] && exit 0\n"
        f'[[ " $* " == *" --list "* ]] && exec {shlex.quote(sys.executable)} "$@"\n'
        'printf "%s|" "$@"\n'
    )
    python.chmod(0o755)

    package, out = str(Path(sparse_fmha.__file__).parents[1]), str(tmp_path / "out")

    def run(*steps, **env):
        return subprocess.run(
            [tmp_path / "benchmarks" / SCRIPT.name, *steps],
            env={**os.environ, "PYTHONPATH": package, "PYTHON": str(python), "OUT": out, **env},
            capture_output=True,
            text=True,
        )

    return run


def test_a_peer_that_does_not_load_stops_it(refresh):
    if importlib.util.find_spec("fastvideo_kernel"):
        pytest.skip("fastvideo-kernel is installed")
    done = refresh("stripes", "blocks")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: --peers vsa: the package fastvideo-kernel is not installed; "
        "WITHOUT=NAMES leaves peers out"
    ]
    assert refresh("stripes").returncode == 0


def test_what_is_left_out_is_named(refresh, tmp_path):
    done = refresh("stripes", "blocks", "host_time", WITHOUT="vsa,fa3")
    assert done.returncode == 0, done.stderr
    assert "|--peers|vsa,flex|--without|vsa,fa3|" in (tmp_path / "out/blocks.log").read_text()
    assert "|--without|vsa,fa3|" in (tmp_path / "out/host_time.log").read_text()
    stripes, blocks, host_time = done.stdout.splitlines()[-3:]
    assert re.fullmatch(r"stripes +ok .*stripes\.log", stripes)
    assert re.fullmatch(r"blocks +ok .*blocks\.log  without vsa", blocks)
    assert re.fullmatch(r"host_time +ok .*host_time\.log  without fa3", host_time)


def test_results_name_what_is_left_out(tmp_path, capsys):
    case = ["--device", "cpu", "--case", "cpu/d64/full/256", "--iterations", "1", "--l2", "warm"]
    path = tmp_path / "made.json"
    options = ["--peers", "torch,flex", "--without", "flex", "--out", str(path)]
    assert main([*case, *options]) == 0
    assert json.loads(path.read_text())["cases"][0]["skipped"] == {"flex": "left out by --without"}
    assert "not measured: flex: left out by --without" in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        main([*case, "--without", "fa9"])
    assert "--without fa9: allowed on cpu are torch" in capsys.readouterr().err


def test_host_time_names_what_is_left_out():
    host_time = importlib.import_module("benchmarks.studies.host_time")
    calls, skipped = host_time.calls("cpu", "float32", 0, "fa3")
    assert "fa3" not in calls
    assert skipped == {"fa3": "left out by --without"}
