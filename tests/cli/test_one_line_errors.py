"""Every example and command ends in one line and a non-zero status for what it cannot do."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# Modules that an example needs beside the library and torch.
NEEDS = {
    "calibrate_embeddings": ["transformers", "all_minilm_l6_v2"],
    "distill_seer_gate": ["transformers", "all_minilm_l6_v2"],
    "text_model": ["transformers"],
    "train_diffusion": ["matplotlib"],
    "train_sparsifiner": [],
    "two_processes": [],
    "video_model": ["diffusers"],
    "video_neighborhood": ["PIL", "rich"],
}
NO_SUCH = ["--no-such-option"]
# What is given, and what the line says.
WRONG = {
    "calibrate_embeddings": [(["text.txt"], "unrecognized arguments: text.txt")],
    "distill_seer_gate": [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (NO_SUCH, "no-such"),
    ],
    "text_model": [(["--tokens", "0"], "--tokens must be at least 1, got 0"), (NO_SUCH, "no-such")],
    "train_diffusion": [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--out", "a.jpg"], "--out must end in .png, got a.jpg"),
        (["--out", "no/such/a.png"], "--out no/such/a.png: no such folder"),
    ],
    "train_sparsifiner": [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (NO_SUCH, "no-such"),
    ],
    "two_processes": [
        (["--length", "0"], "--length must be a multiple of 256, got 0"),
        (["--length", "1000"], "--length must be a multiple of 256, got 1000"),
        (NO_SUCH, "no-such"),
    ],
    "video_model": [
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--grid", "0", "4", "4"], "--grid 0 4 4: at least 2"),
        (["--grid", "4"], "expected 3 arguments"),
    ],
    "video_neighborhood": [
        (["--frames", "0"], "--frames must be at least 1, got 0"),
        (["--size", "-1"], "--size must be at least 2, got -1"),
        (["--size", "9999"], "9999"),
        (["--pan", "-1"], "--pan must be at least 0, got -1"),
        (["--pan", "900"], "the camera leaves the photograph"),
        (["--sigma", "nan"], "--sigma must be at least 1, got nan"),
        (["--window", "0", "3", "3"], r"window\[\d\] must be at least 1, got 0"),
        (["--out", "a.mp4"], "--out a.mp4: must end in"),
        (["--out", "no/such/a.png"], "--out no/such/a.png"),
    ],
}
TINY = ["--tiny", "--out"]
SANITIZE = ROOT / "tests" / "gpu" / "sanitize.py"
MODULES = {
    "sparse_fmha": [
        ([], "arguments are required: command"),
        (["simulate"], "required: --grid, --window"),
        (
            ["simulate", "--grid", "8x8", "--window", "x"],
            "--window must be numbers such as 30x48x80, got 'x'",
        ),
        (["demo", "--window", "0"], "--window must be from .*, got 0"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
        (["info", "x"], "unrecognized arguments: x"),
        (["report", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["report", "--seed", "x"], "invalid int value: 'x'"),
        (["report", "--device", "cpu", "--arch", "sm80"], "--arch is for GPUs, got sm80"),
    ],
    "benchmarks": [
        (["--device", "cpu", "--case", "no/such"], "--case no/such: no cpu case has such a name"),
        (["--device", "cpu", "--case", "cpu/*", "--case", "fmha/*"], r"--case fmha/\*: no cpu"),
        (["--device", "cpu", "--peers", "torch,fa9"], "--peers fa9: allowed on cpu are torch"),
        (["--device", "cuda", "--list", "--peers", "fa3"], "fa3: the package fa3-fwd is not inst"),
        (["--device", "cuda", "--list", "--peers", "sta"], "sta: the package fastvideo-kernel is"),
        (["--device", "cuda", "--list", "--peers", "vsa"], "vsa: the package fastvideo-kernel is"),
        (
            ["--device", "cpu", "--iterations", "0"],
            "argument --iterations: must be at least 1, got 0",
        ),
        (
            ["--device", "cpu", "--case", "cpu/*", "--quick", "--l2", "cold"],
            "--quick changes nothing beside --case and --l2",
        ),
        (["--device", "cpu", "--out", "{file}"], "argument --out: .*file: a folder, or a file"),
        (["--device", "cpu", "--out", "{file}/a.json"], "argument --out: .*a.json: a folder, or"),
        (["--device", "cpu", "--out", "{folder}.json"], "argument --out: .*.json: a folder, or"),
    ],
    "benchmarks.studies.backward": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.skip_training": [
        (["--tiny", "--length", "0"], "argument --length: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.skipping_gradients": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.builders": [
        (["--case", "none"], "argument --case: invalid choice: 'none'"),
        (["--calls", "0"], "argument --calls: must be at least 1, got 0"),
        (["--quick", "--calls", "2"], "--calls is of --quick's own choice"),
        (["--out", "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.calibrate": [(NO_SUCH, "no-such"), ([*TINY, "{file}"], "argument --out: ")],
    "benchmarks.studies.cpu": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        (["--tiny", "--only", "none"], "--only none: no case has such a name"),
        (["--tiny", "--clock", "cpu", "--threads", "2"], "--clock cpu: --threads must be 1, got 2"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.decode": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        (["--only", "none"], "argument --only: none is none of dense, pages, ragged"),
        (["--peers", "fa2"], "argument --peers: fa2 is none of cudnn, fa3, flashinfer"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.dilation": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.diffusion": [
        (["--case", "none"], "argument --case: invalid choice: 'none'"),
        (["--tiny", "--layers", "0"], "argument --layers: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.frontier": [
        (["--length", "1000"], "--length must be a multiple of 16, got 1000"),
        (["--tiny", "--heads", "3"], "--heads must be a multiple of --heads-kv 2, got 3"),
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.host_time": [
        (["--device", "cpu", "--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
        (["--tiny", "--calls", "3"], "--calls is of --tiny's own choice"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.key_bias": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.methods": [
        (["--case", "none"], "argument --case: invalid choice: 'none'"),
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.models": [
        (["--case", "none"], "argument --case: invalid choice: 'none'"),
        (["--tiny", "--blocks", "0"], "argument --blocks: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.other_gpus": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.other_gpus_decode": [
        (["--l2", "hot"], "argument --l2: invalid choice: 'hot'"),
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.narrow_heads": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.vision": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.query_rows": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.score_sums": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.serving": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.studies.selections": [
        (["--case", "none"], "argument --case: invalid choice: 'none'"),
        (["--length", "0"], "argument --length: must be at least 1, got 0"),
    ],
    "benchmarks.studies.small": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        (["--tiny", "--only", "none"], "--only none: no case has such a name"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    "benchmarks.tables.readme": [
        (["--readme", "{folder}/none.md"], "No such file or directory: .*none.md"),
        (["--tables", "{folder}/none.md"], "No such file or directory: .*none.md"),
        (["--choosing", "{folder}/none.md"], "No such file or directory: .*none.md"),
        (["--results", "{folder}/none"], "--results .*none: no such folder"),
    ],
    "benchmarks.studies.scaling": [
        (["--op", "none"], "argument --op: invalid choice: 'none'"),
        (["--tiny", "--length", "2048"], "--length is of --tiny's own choice"),
        (["--tiny", "--heads-kv", "2"], "--heads-kv is of --tiny's own choice"),
        (["--op", "full", "--density", "0.5"], "--density changes nothing for --op full"),
        (["--tiny"], "no ranks; start it with torchrun"),
    ],
    "benchmarks.studies.scaling_model": [
        (["--check", "--write"], "argument --write: not allowed with argument --check"),
    ],
    "benchmarks.studies.stripes": [
        (["--tiny", "--iterations", "0"], "argument --iterations: must be at least 1, got 0"),
        ([*TINY, "{file}"], "argument --out: "),
    ],
    SANITIZE: [
        (["--only", "none"], "argument --only: invalid choice: 'none'"),
        (["--head-dim", "32"], "argument --head-dim: invalid choice: 32"),
    ],
}
NEED_GPU = [
    *(
        f"benchmarks.studies.{name}"
        for name in (
            "backward",
            "calibrate",
            "decode",
            "diffusion",
            "models",
            "narrow_heads",
            "other_gpus",
            "other_gpus_decode",
            "scaling",
            "stripes",
        )
    ),
    SANITIZE,
]


@pytest.fixture
def last_line(capsys, monkeypatch):
    """Returns a function that runs a program which must fail; the last line of stderr."""

    def run(program, arguments):
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        if isinstance(program, Path):  # as Python does for a script
            monkeypatch.syspath_prepend(program.parent)
            monkeypatch.delitem(sys.modules, "calibrate_embeddings", raising=False)
        # runpy warns of what was imported before.
        if str(program).startswith("benchmarks."):
            monkeypatch.delitem(sys.modules, program, raising=False)
        start = runpy.run_path if isinstance(program, Path) else runpy.run_module
        with pytest.raises(SystemExit) as stop:
            start(str(program), run_name="__main__")
        status = stop.value.code
        err = capsys.readouterr().err
        if isinstance(status, str):  # as Python prints it
            err, status = f"{err}{status}\n", 1
        assert status in (1, 2)
        *usage, line = err.splitlines()
        assert not usage or usage[0].startswith("usage: "), err
        return line

    return run


def rows(table):
    return [(name, *row) for name, wrong in table.items() for row in wrong]


def example(name):
    return ROOT / "examples" / f"{name}.py"


def test_all_examples_are_here():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert set(NEEDS) == set(WRONG) == names


@pytest.mark.parametrize(("name", "module"), [(n, m) for n, ms in NEEDS.items() for m in ms])
def test_an_example_without_its_package(last_line, monkeypatch, name, module):
    if module == "all_minilm_l6_v2":
        pytest.importorskip("transformers")
    for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    assert re.match(r"error: .*pip install ", last_line(example(name), []))


@pytest.mark.parametrize(("name", "arguments", "words"), rows(WRONG))
def test_an_example_with_wrong_options(last_line, monkeypatch, tmp_path, name, arguments, words):
    for module in NEEDS[name]:
        if module != "all_minilm_l6_v2":
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    line = last_line(example(name), arguments)
    assert re.search(rf"error: .*{words}", line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["train_diffusion", "video_model", "video_neighborhood"])
def test_an_example_without_a_gpu(last_line, name):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    line = last_line(example(name), ["--device", "cuda"])
    assert line == "error: --device cuda: torch sees no CUDA device"


@pytest.mark.parametrize(("module", "arguments", "words"), rows(MODULES))
def test_a_command_with_wrong_options(last_line, monkeypatch, tmp_path, module, arguments, words):
    monkeypatch.delenv("RANK", raising=False)
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    places["file"].touch()
    Path(f"{places['folder']}.json").mkdir()
    line = last_line(module, [argument.format(**places) for argument in arguments])
    assert re.search(rf"error: .*{words}", line)


def test_all_commands_are_here():
    programs = (p for p in (ROOT / "benchmarks").rglob("*.py") if "__main__" in p.read_text())
    modules = (".".join(p.relative_to(ROOT).with_suffix("").parts) for p in programs)
    names = {module.removesuffix(".__main__") for module in modules}
    assert names | {"sparse_fmha", SANITIZE} == set(MODULES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", NEED_GPU)
def test_a_benchmark_without_a_gpu(last_line, module):
    assert re.search(r"error: .*(no GPU|no CUDA device)", last_line(module, []))


def test_a_plot_without_matplotlib(last_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.tables.plot", raising=False)
    line = last_line("benchmarks", ["--device", "cpu", "--list", "--plot"])
    assert re.match(r"error: .*matplotlib.*pip install 'sparse-fmha\[demo\]'", line)
