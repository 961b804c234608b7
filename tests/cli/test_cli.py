"""The command line: exit status, and one line on stderr for whatever goes wrong."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sparse_fmha
from sparse_fmha import _C, cli
from sparse_fmha._build import KernelTable
from sparse_fmha._versions import FLOORS
from sparse_fmha.cli import demo, info


@pytest.fixture
def picture(tmp_path):
    """Stripes under a slope, 48 x 40, grayscale."""
    y, x = np.mgrid[:40, :48]
    levels = 60 + 2 * x + 60 * ((x + y) // 8 % 2)
    path = tmp_path / "stripes.png"
    Image.fromarray(levels.astype(np.uint8)).save(path)
    return path


def test_demo_as_a_command(picture, tmp_path):
    out = tmp_path / "out.png"
    command = [sys.executable, "-m", "sparse_fmha", "demo", "--image", picture, "--out", out]
    done = subprocess.run([*command, "--window", "9"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    before = float(lines["noisy"][1])
    after = float(lines["neighborhood 9x9"][2])
    assert after > before + 4
    assert "1,920" in lines["dense"]
    assert lines["dense"][-1] == "1.0x"
    assert lines["neighborhood 9x9"][-1].endswith("x")
    assert "neighborhood 9x9" in done.stderr, "progress"
    assert f"picture: {out}" in done.stdout
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 10


def error_of(capsys, arguments):
    """Exit status and message of a command that fails; the message is one line."""
    status = cli.main(["demo", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    return status, printed.err


def test_bad_path(capsys, tmp_path):
    status, message = error_of(capsys, ["--image", tmp_path / "none.png"])
    assert status == 2
    assert "none.png: no such file" in message


@pytest.mark.parametrize("content", [b"", b"hello, this is text\n" * 50])
def test_not_a_picture(capsys, tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    status, message = error_of(capsys, ["--image", path])
    assert status == 2
    assert "not a picture" in message


def test_folder_is_not_a_picture(capsys, tmp_path):
    assert error_of(capsys, ["--image", tmp_path])[0] == 2


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_cut_off_file(capsys, tmp_path, part):
    whole, path = tmp_path / "whole.png", tmp_path / "cut.png"
    levels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(levels).save(whole)
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
    status, message = error_of(capsys, ["--image", path])
    assert status == 2
    assert "not a picture" in message


def test_too_large_a_picture(capsys, tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (4000, 3000), 128).save(path)
    status, message = error_of(capsys, ["--image", path])
    assert status == 2
    assert "4000x3000 is 12.00 megapixels, the limit with a 21x21 window is 1.81" in message
    size = int(message.split()[-1])
    assert size**2 * 441 <= demo.MAX_PAIRS < (size + 1) ** 2 * 441


def test_far_too_large_to_decode(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "bomb.png"
    Image.new("L", (32, 32), 128).save(path)
    status, message = error_of(capsys, ["--image", path])
    assert status == 2
    assert "too large" in message


def test_too_small_a_picture(capsys, picture):
    status, message = error_of(capsys, ["--image", picture, "--window", 41])
    assert status == 2
    assert "48x40 pixels, less than the window 41x41" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", 1], "--window must be from 2 to 168, got 1"),
        (["--window", 169], "--window must be from 2 to 168, got 169"),
        (["--sigma", "nan"], "--sigma must be from 1 to 255, got nan"),
        (["--sigma", 0], "--sigma must be from 1 to 255, got 0"),
        (["--resize", 20], "--resize must be at least the window, 21, got 20"),
        (["--out", "a.jpg"], "--out must end in .png, got a.jpg"),
        (["--out", "no/such/a.png"], "--out must be in a folder that exists, got no/such/a.png"),
    ],
)
def test_bad_options(capsys, arguments, words):
    status, message = error_of(capsys, arguments)
    assert status == 2
    assert words in message


def test_out_is_a_folder(capsys, tmp_path):
    (tmp_path / "a.png").mkdir()
    status, message = error_of(capsys, ["--out", tmp_path / "a.png"])
    assert status == 2
    assert "--out must be a file that can be written" in message


def test_argparse_rejects_what_is_no_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--device", "tpu"])
    assert stop.value.code == 2
    assert "invalid choice: 'tpu'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(capsys):
    status, message = error_of(capsys, ["--device", "cuda"])
    assert status == 1
    assert "--device cuda: torch sees no CUDA device" in message


def test_what_the_library_refuses_is_one_line(capsys, picture, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise RuntimeError("no kernel for this;\n  rows: none")

    monkeypatch.setattr(sparse_fmha, "neighborhood_attention", refuse)
    status = cli.main(["demo", "--image", str(picture), "--out", str(tmp_path / "a.png")])
    assert status == 1
    assert "error: no kernel for this; rows: none\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "package"), [("PIL", "pillow"), ("matplotlib", "matplotlib"), ("rich", "rich")]
)
def test_missing_package(module, package):
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from sparse_fmha.cli import main\nsys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: sparse_fmha.cli.demo needs {package} >= {FLOORS[package]}, which is not "
        "installed: pip install 'sparse-fmha[demo]'\n"
    )


def test_info_as_a_command():
    command = [sys.executable, "-m", "sparse_fmha", "info"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in (sparse_fmha.__version__, torch.__version__, "cpu", "neighborhood", "float32"):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) <= 10 + torch.cuda.device_count()


def test_info_with_the_table(capsys):
    assert cli.main(["info"]) == 0
    short = capsys.readouterr().out
    assert "; --kernels lists them\n" in short
    assert cli.main(["info", "--kernels"]) == 0
    whole = capsys.readouterr().out
    assert str(sparse_fmha.kernels()) in whole
    assert "cpu_dense_float32" not in short


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sparse-fmha {sparse_fmha.__version__}\n"


def test_info_shows_registers_and_unused_kernels(monkeypatch):
    row = {"name": "sm90_dense_float16_d64", "arch": "sm90", "mechanism": "dense"}
    row |= {"dtype": "float16", "registers": 168, "spill_bytes": 0}
    monkeypatch.setattr(sparse_fmha, "kernels", lambda: KernelTable([row]))
    monkeypatch.setattr(sparse_fmha, "build_info", lambda: {"cutlass": "4.2.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = info.report(with_kernels=True)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "sm90_dense_float16_d64 sm90 dense float16 168 0" in lines
    assert "CUTLASS 4.2.0" in text
    assert "cpu: no kernel was compiled for it" in text
    assert "cuda: GPU kernels are compiled in, but torch" in text


@pytest.mark.parametrize(
    ("arch", "capability", "kernels", "problem"),
    [
        ("sm90", (9, 0), "dense in float16", None),
        ("sm90", (8, 0), "no kernel", "cuda:0: no kernel for it"),
        ("sm80", (8, 0), "dense in float16", "cuda:0: its kernels were never run on such a GPU"),
    ],
)
def test_which_gpu_a_kernel_runs_on(monkeypatch, arch, capability, kernels, problem):
    row = {"name": f"{arch}_dense_float16_d64", "arch": arch, "mechanism": "dense"}
    row |= {"dtype": "float16"}
    monkeypatch.setattr(sparse_fmha, "kernels", lambda: KernelTable([row]))
    monkeypatch.setattr(info, "devices", lambda: {"cpu": "a CPU", "cuda:0": "a GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(info, "why_no_image", lambda device, arch: "")
    assert info.would_run() == ["cpu: a CPU: no kernel", f"cuda:0: a GPU: {kernels}"]
    found = [line for line in info.problems() if line.startswith("cuda:0")]
    assert bool(found) == bool(problem)
    assert not problem or found[0].startswith(problem)


def test_info_says_which_code_there_is_and_what_it_lacks(monkeypatch):
    row = {"name": "sm86_dense_float16_d64", "arch": "sm86", "mechanism": "dense"}
    monkeypatch.setattr(sparse_fmha, "kernels", lambda: KernelTable([row | {"dtype": "float16"}]))
    build = {"images": ["100", "compute_80"], "cuda": "13.1.80"}
    monkeypatch.setattr(sparse_fmha, "build_info", lambda: build)
    monkeypatch.setattr(info, "devices", lambda: {"cuda:0": "an L4"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for driver, said in ((13000, "knows CUDA up to 13.0"), (0, "no driver is found")):
        monkeypatch.setattr(_C, "driver_version", lambda driver=driver: driver)
        line = next(x for x in info.report().splitlines() if x.startswith("GPU code: "))
        assert line.startswith("GPU code: 100, compute_80 by CUDA 13.1.80; ")
        assert line.endswith(said)
    monkeypatch.setattr(_C, "why_no_image", lambda *of: f"{of[0]} on {of[1]} of {of[2:]}")
    assert "sm86 on cuda:0 of (8, 9)" in info.problems()


def test_limits_are_as_documented():
    """A 1024 x 1024 picture passes with the default window."""
    limit = demo.check(cli.parser().parse_args(["demo"]).out, "cpu", 21, 25.0, None)
    assert limit >= 1024 * 1024
