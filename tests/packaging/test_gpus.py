"""Which kernels `make demo`, `make test` and `pip install .` build, by what the machine has."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools
from commands import ROOT

import bootstrap
import gpus
import locate
from sparse_fmha import _C

H100 = "NVIDIA H100 80GB HBM3, 9.0\n"
A100 = "NVIDIA A100-SXM4-80GB, 8.0\n"
RTX = "NVIDIA GeForce RTX 5090, 12.0\n"
V100 = "Tesla V100-SXM2-32GB, 7.0\n"
SCRIPT = "#!/bin/sh\n[ {status} = 0 ] && printf '{text}'\nexit {status}\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Returns a function that fakes nvidia-smi, torch and nvcc; None is one that is not
    there, of torch one that does not load."""

    def program(name: str, text: str | None, status: int = 0) -> Path:
        path = tmp_path / name
        if text is not None:
            path.write_text(SCRIPT.format(text=text.replace("\n", "\\n"), status=status))
            path.chmod(0o755)
        return path

    def fake(smi: str | None, torch: str | None = "", nvcc: str | None = "release 13.0", **env):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("SPARSE_FMHA_ARCHS", env.get("archs", ""))
        monkeypatch.setenv("CUDACXX", str(program("nvcc", nvcc)))
        program("nvidia-smi", smi, env.get("smi_status", 0))
        return program("python", torch or "", int(torch is None))

    return fake


@pytest.mark.parametrize(
    ("has", "archs", "line"),
    [
        ({"smi": None}, "none", "no GPU is seen here; SPARSE_FMHA_ARCHS=90a,80,86 builds t"),
        ({"smi": None, "torch": None}, "none", "no GPU is seen here"),
        ({"smi": "No devices were found", "smi_status": 6}, "none", "no GPU is seen here"),
        ({"smi": H100}, "90a", r"GPU kernels for 90a: NVIDIA H100 80GB HBM3 .*9\.0.* on two$"),
        ({"smi": H100, "torch": None}, "90a", r"90a: .*is a CPU build, which cannot run them: TOR"),
        ({"smi": A100 + H100}, "90a,80", "GPU kernels for 90a, 80: .*A100.*H100"),
        ({"smi": A100}, "80", "GPU kernels for 80: NVIDIA A100"),
        ({"smi": RTX}, "86", "GPU kernels for 86: .*5090"),
        ({"smi": "", "smi_status": 9, "torch": H100}, "90a", "H100"),
        ({"smi": None, "torch": H100}, "90a", "H100"),
        ({"smi": V100}, "none", r"V100.*7\.0\) is not supported; supported are 9\.0, 8.*; SPA"),
        ({"smi": H100, "nvcc": None}, "none", "though there is NVIDIA H100.*nvcc >= 12.5 is need"),
        ({"smi": H100, "nvcc": "release 11.8"}, "none", r"though there is .*nvcc is 11\.8$"),
        ({"smi": None, "nvcc": None}, "none", "no GPU is seen here$"),
        ({"smi": None, "archs": "90a"}, "90a", "90a, as SPARSE_FMHA_ARCHS=90a asks$"),
        ({"smi": H100, "archs": "none"}, "none", "alone, as SPARSE_FMHA_ARCHS=none asks$"),
    ],
)
def test_the_demo_builds_what_runs_here(machine, has, archs, line):
    python = machine(**has)
    found, said = gpus.choose(python)
    assert found == archs
    assert "\n" not in said
    assert re.search(line, said), said


@pytest.fixture
def goal(monkeypatch):
    """Returns a function that runs a goal without building; the SPARSE_FMHA_ARCHS of its build."""

    def run(name: str) -> str:
        built = []

        class Environment(bootstrap.Environment):
            def create(self):
                pass

            def build(self, extra):
                built.append(os.environ.get("SPARSE_FMHA_ARCHS", ""))

        monkeypatch.setattr(bootstrap, "Environment", Environment)
        monkeypatch.setattr(bootstrap, "check_compiler", lambda: None)
        monkeypatch.setattr(bootstrap, "run", lambda *_, **__: None)
        monkeypatch.setattr(bootstrap, "checks", lambda _: [])
        monkeypatch.setattr(sys, "argv", ["bootstrap.py", name])
        bootstrap.main()
        return built[0]

    return run


@pytest.mark.parametrize(("name", "archs"), [("demo", "none"), ("test", ""), ("build", "")])
def test_goals_where_there_is_no_gpu(machine, goal, name, archs):
    machine(None)
    assert goal(name) == archs


@pytest.mark.parametrize("name", ["demo", "test", "build"])
@pytest.mark.parametrize(
    ("has", "words"),
    [
        ({"archs": "70"}, r"SPARSE_FMHA_ARCHS=70: 70 is not supported; allowed are none, or a li"),
        ({"archs": "90a,x"}, "SPARSE_FMHA_ARCHS=90a,x: x is not supported"),
        ({"archs": "90a", "nvcc": None}, "90a: nvcc >= 12.5 is needed; .*does not run.*ARCHS=none"),
        ({"archs": "90a", "nvcc": "release 11.8"}, "nvcc is 11.8; set CUDACXX"),
        ({"archs": "90a", "nvcc": ""}, "nvcc does not say its version"),
    ],
)
def test_archs_that_cannot_be_built_stop_every_goal_first(machine, goal, name, has, words):
    machine(H100, **has)
    with pytest.raises(bootstrap.SetupError, match=words) as caught:
        goal(name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def setup_script(monkeypatch):
    """What setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_each_set_of_architectures_has_its_build_tree(machine, setup_script):
    """CMake deletes the objects of targets that are gone, so one tree would lose the kernels."""
    trees = {}
    nvcc = "release 13.0"
    for given in [("", nvcc), ("90a,86,80", nvcc), ("90a", nvcc), ("none", ""), ("", None)]:
        machine(None, archs=given[0], nvcc=given[1])
        trees[given] = setup_script["tree"]()
    everything, asked, one, none, absent = trees.values()
    assert everything == asked == ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    assert one == everything.with_name(f"{everything.name}-90a")
    assert none == absent == everything.with_name(f"{everything.name}-none")


@pytest.mark.parametrize(
    ("function", "variable", "value", "words"),
    [
        ("jobs", "MAX_JOBS", "many", "MAX_JOBS=many: a number of at least 1 is needed"),
        ("jobs", "MAX_JOBS", "0", "MAX_JOBS=0: a number of at least 1"),
        ("cmake_options", "CMAKE_ARGS", "-DA='b", "CMAKE_ARGS=-DA='b: No closing quotation"),
        ("tree", "SPARSE_FMHA_ARCHS", "70", "SPARSE_FMHA_ARCHS=70: 70 is not supported"),
    ],
)
def test_variables_that_setup_cannot_use(
    setup_script, monkeypatch, function, variable, value, words
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=f"^error: {words}"):
        setup_script[function]()


def test_the_build_reads_the_table_that_the_library_has():
    of_library = {arch: [f"{a}.{b}" for a, b in gpus] for arch, gpus in _C.gpu_archs().items()}
    assert list(locate.ARCHS.values()) == list(of_library.values())
    assert all(locate.ARCHS.values())
