"""Inputs of the build that are wrong or missing get one line that says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

import build_backend
import kernel_list
import locate


@pytest.fixture
def configure(tmp_path):
    """Returns a function that configures with options and returns status and output on one line."""

    def run(*options: str, root: Path = ROOT) -> tuple[int, str]:
        cmake = Path(sys.executable).with_name("cmake")
        command = [
            *(
                str(cmake) if cmake.exists() else "cmake",
                "-S",
                str(root),
                "-B",
                str(tmp_path / "build"),
            ),
            *("-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)

    return run


def fake_package(folder: Path, name: str, **files: str) -> Path:
    package = folder / name
    for path, text in {"__init__.py": "", **files}.items():
        target = package / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return package


def cutlass_header(folder: Path, version: tuple[int, int, int]) -> Path:
    lines = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    text = "".join(f"#define CUTLASS_{part} {number}\n" for part, number in lines)
    header = folder / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text(text)
    return folder


def fake_nvcc(folder: Path, release: str) -> Path:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


needs_nvcc = pytest.mark.skipif(
    not locate.builds_gpu_kernels(), reason="needs nvcc and SPARSE_FMHA_ARCHS other than none"
)


def test_none_builds_for_the_cpu_alone(configure):
    status, output = configure("-DSPARSE_FMHA_ARCHS=none")
    assert status == 0, output
    assert "GPU kernels: none, as asked" in output


def test_unknown_architecture(configure):
    status, output = configure("-DSPARSE_FMHA_ARCHS=90a,70")
    assert status != 0
    assert "70 is not supported; allowed are none, or a list of: 90a, 80, 86" in output


def test_without_nvcc(configure, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    status, output = configure()
    assert status == 0, output
    assert "GPU kernels: none" in output
    status, output = configure("-DSPARSE_FMHA_ARCHS=90a")
    assert status != 0
    assert "SPARSE_FMHA_ARCHS=90a: nvcc >= 12.5 is needed" in output


def test_old_nvcc(configure, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path, "11.8")))
    status, output = configure("-DSPARSE_FMHA_ARCHS=90a")
    assert status != 0
    assert "nvcc >= 12.5 is needed" in output
    assert "is 11.8" in output


@needs_nvcc
def test_wrong_cutlass(configure, tmp_path):
    checkout = cutlass_header(tmp_path / "checkout", (3, 9, 1))
    status, output = configure(f"-DCUTLASS_DIR={checkout}")
    assert status != 0
    assert "CUTLASS 3.9.1 in" in output
    assert "pip install --no-deps nvidia-cutlass==4.2.0.0" in output


@needs_nvcc
def test_no_cutlass_at_cutlass_dir(configure, tmp_path):
    status, output = configure(f"-DCUTLASS_DIR={tmp_path}")
    assert status != 0
    assert "CUTLASS_DIR must be a checkout of CUTLASS v4.2.0" in output


def test_missing_cutlass(monkeypatch, tmp_path):
    monkeypatch.delenv("CUTLASS_DIR", raising=False)
    monkeypatch.setattr(locate, "_search_path", lambda: [str(tmp_path)])
    with pytest.raises(LookupError, match=r"pip install --no-deps nvidia-cutlass==4\.2\.0\.0"):
        locate.cutlass()


def test_old_torch(configure, monkeypatch, tmp_path):
    old = fake_package(tmp_path, "torch", **{"version.py": "__version__ = '2.9.1'\n"})
    monkeypatch.setenv("SPARSE_FMHA_TORCH", str(old))
    status, output = configure("-DSPARSE_FMHA_ARCHS=none")
    assert status != 0
    assert "torch 2.9.1" in output
    assert "too old: install torch >= 2.10" in output


def test_torch_directory_that_is_none(configure, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_FMHA_TORCH", str(tmp_path))
    status, output = configure("-DSPARSE_FMHA_ARCHS=none")
    assert status != 0
    assert "is not the directory of a torch package" in output


def test_torch_is_never_a_build_requirement_unasked(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSE_FMHA_TORCH", raising=False)
    monkeypatch.chdir(ROOT)
    required = build_backend.get_requires_for_build_wheel()
    assert not any(name.startswith("torch") for name in required)

    monkeypatch.setattr(locate, "_search_path", lambda: [str(tmp_path)])
    with pytest.raises(SystemExit, match=r"install torch >= 2\.10 first"):
        build_backend.get_requires_for_build_wheel()

    monkeypatch.setenv("SPARSE_FMHA_TORCH", "torch==2.13.0")
    assert "torch==2.13.0" in build_backend.get_requires_for_build_wheel()


def test_cutlass_is_required_only_for_gpu_kernels(monkeypatch, tmp_path):
    torch = fake_package(tmp_path, "torch", **{"version.py": "__version__ = '2.13.0'\n"})
    monkeypatch.delenv("CUTLASS_DIR", raising=False)
    monkeypatch.setenv("SPARSE_FMHA_TORCH", str(torch))
    monkeypatch.setattr(locate, "_search_path", lambda: [str(tmp_path)])
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path, "13.0")))
    monkeypatch.setenv("SPARSE_FMHA_ARCHS", "")
    assert locate.PINNED_CUTLASS in build_backend.get_requires_for_build_wheel()
    monkeypatch.setenv("SPARSE_FMHA_ARCHS", "none")
    assert locate.PINNED_CUTLASS not in build_backend.get_requires_for_build_wheel()


ENTRY = """# a comment
kernel(mechanism=BlockSparse, elements=[half_t, bfloat16_t], head_dim=64,
       tile_q=128, tile_k=128, stages=3, schedule=kFree, skipping=kByThreshold)
"""


def test_an_entry_is_a_row_for_each_element(tmp_path):
    listed = tmp_path / "sm90_forward.def"
    listed.write_text(ENTRY)
    rows = kernel_list.read(listed)
    assert [row.name for row in rows] == [
        "sm90_block_sparse_float16_d64_skip",
        "sm90_block_sparse_bfloat16_d64_skip",
    ]
    text = kernel_list.source(rows)
    assert text.count("/*kTileK=*/128,") == 2
    assert all(f'("{row.name}")' in text for row in rows)
    assert kernel_list.ALL_WIDTHS not in text


def test_rows_of_a_mechanism_share_a_file(tmp_path):
    listed = tmp_path / "sm90_forward.def"
    wide = ENTRY.replace("head_dim=64", "head_dim=128").replace("tile_k=128", "tile_k=112")
    always = ENTRY.replace("kByThreshold", "kNever")
    listed.write_text(ENTRY + wide + always)
    rows = kernel_list.read(listed)
    assert [row.file for row in rows] == ["sm90_block_sparse_skip"] * 4 + ["sm90_block_sparse"] * 2
    # 112 is a width that CuTe defines on request.
    assert kernel_list.source(rows[:4]).startswith(kernel_list.ALL_WIDTHS)


def test_rows_with_biases(tmp_path):
    listed = tmp_path / "sm90_forward.def"
    plain = ENTRY.replace("kByThreshold", "kNever")
    listed.write_text(plain + plain.replace("kNever", "kNever, bias=kPerKey"))
    rows = kernel_list.read(listed)
    assert [row.key_bias for row in rows] == [False, False, True, True]
    assert rows[3].name == "sm90_block_sparse_bfloat16_d64_bias"
    assert rows[3].file == "sm90_block_sparse_bias"
    assert "WithKeyBias" not in kernel_list.source(rows[:2])
    assert kernel_list.source(rows[2:]).count("Config = WithKeyBias<KernelConfig<") == 2


def test_rows_of_dilation_classes(tmp_path):
    """Of neighborhoods, by kernels and in a file of their own."""
    listed = tmp_path / "sm90_forward.def"
    plain = ENTRY.replace("kByThreshold", "kNever").replace("BlockSparse", "Neighborhood")
    listed.write_text(plain + plain.replace("Neighborhood", "DilatedNeighborhood"))
    rows = kernel_list.read(listed)
    assert [row.dilated for row in rows] == [False, False, True, True]
    assert {row.mechanism_name for row in rows} == {"neighborhood"}
    assert rows[3].name == "sm90_neighborhood_bfloat16_d64_dilated"
    assert rows[3].file == "sm90_dilated_neighborhood_dilated"
    source = kernel_list.source(rows[2:])
    assert source.count("/*Mechanism=*/DilatedNeighborhood") == 2
    assert source.count("kernel_row<Config, Neighborhood>") == 2


def test_rows_that_differ_in_their_query_tile(tmp_path):
    """Two mechanisms, by one kernel, in a file of its own; the first row keeps its name."""
    listed = tmp_path / "sm90_forward.def"
    first = ENTRY.replace("kByThreshold", "kNever, tile_ns=9, step_ns=8")
    rows = [first.replace("BlockSparse", name) for name in ("Dense", "Causal")]
    further = first.replace("BlockSparse", "DenseOrCausal").replace("tile_q=128", "tile_q=64")
    further = further.replace("step_ns=8", "step_ns=7, alone_ns=6, blocks=2")
    listed.write_text("".join(rows) + further)
    rows = kernel_list.read(listed)
    assert [row.name for row in rows[1::2]] == [
        "sm90_dense_bfloat16_d64",
        "sm90_causal_bfloat16_d64",
        "sm90_causal_float16_d64_q64",
        "sm90_causal_bfloat16_d64_q64",
    ]
    assert [row.file for row in rows[2:]] == ["sm90_causal"] * 2 + ["sm90_dense_or_causal_q64"] * 4
    text = kernel_list.source(rows[4:])
    assert text.count("Config = WithBlocks<KernelConfig<") == 4
    assert text.count("/*Mechanism=*/DenseOrCausal,") == 4
    assert 'kernel_row<Config, Causal>("sm90_causal_float16_d64_q64")' in text


def test_a_further_row_has_costs(tmp_path):
    listed = tmp_path / "sm90_forward.def"
    listed.write_text(ENTRY + ENTRY.replace("tile_q=128", "tile_q=64"))
    with pytest.raises(kernel_list.ListError, match=":5: a second row for sm90_block_sparse_fl"):
        kernel_list.read(listed)


def test_architectures_share_kernels(tmp_path):
    listed = tmp_path / "sm80_decode.def"
    shared = ENTRY.replace("schedule=kFree", "archs=[sm80, sm86]")
    listed.write_text(shared)
    rows = kernel_list.read(listed)
    assert [row.name for row in rows] == [
        f"{arch}_decode_block_sparse_{dtype}_d64_skip"
        for arch in ("sm80", "sm86")
        for dtype in ("float16", "bfloat16")
    ]
    assert {row.file for row in rows} == {"sm80_decode_block_sparse_skip"}
    text = kernel_list.source(rows)
    assert text.count("kernel_row<Config, Arch::kSm80>") == 2
    assert text.count("kernel_row<Config, Arch::kSm86>") == 2
    configs = {part.partition(">;")[0] for part in text.split("using Config")[1:]}
    assert len(configs) == 2, "one kernel for each dtype"
    listed.write_text(shared.replace("sm86", "sm33"))
    with pytest.raises(kernel_list.ListError, match=r"archs is \[sm80, sm33\]; a list of sm90, "):
        kernel_list.read(listed)


def test_a_row_for_values_of_their_own_head_dim(tmp_path):
    """Beside one of the same head dim of q; its file tells the registry of both."""
    listed = tmp_path / "sm90_forward.def"
    listed.write_text(ENTRY + ENTRY.replace("head_dim=64", "head_dim=64, value_dim=32"))
    rows = kernel_list.read(listed)
    names = [
        f"sm90_block_sparse_{t}_d64{v}_skip" for v in ("", "_v32") for t in ("float16", "bfloat16")
    ]
    assert [row.name for row in rows] == names
    assert [row.value_dim for row in rows] == [64, 64, 32, 32]
    text = kernel_list.source(rows)
    assert text.count("WithValueDim<KernelConfig<") == 2
    assert text.count(">, 32>;") == 2
    listed.write_text(ENTRY.replace("head_dim=64", "head_dim=64, value_dim=0"))
    with pytest.raises(kernel_list.ListError, match="value_dim is 0; a whole number above 0"):
        kernel_list.read(listed)


def test_some_rows_alone(tmp_path):
    files = kernel_list.write(tmp_path, ["90a", "80"], "^sm90_causal_.*_d(64|96)$")
    names = [row.name for rows in files.values() for row in rows]
    assert names == [f"sm90_causal_{t}_d{d}" for d in (64, 96) for t in ("float16", "bfloat16")]
    assert {path.name for path in tmp_path.glob("*.cu")} == {"sm90_causal.cu"}
    listed = (tmp_path / "kernel_rows.inc").read_text()
    assert listed == "".join(f"SPARSE_FMHA_ROW({name})\n" for name in names)
    for wrong, why in {"sm70": "no row of 90a, 80 has such a name", "(": "missing \\)"}.items():
        with pytest.raises(kernel_list.ListError, match=f"SPARSE_FMHA_ROWS=.*: {why}"):
            kernel_list.write(tmp_path, ["90a", "80"], wrong)


@pytest.mark.parametrize(
    ("archs", "file"), [(["80"], "80"), (["86"], "86"), (["80", "86"], "80"), (["90a"], None)]
)
def test_shared_kernels_are_compiled_once(tmp_path, archs, file):
    files = kernel_list.write(tmp_path, archs)
    members = files.get("sm80_decode_dense")
    assert (members and members[0].arch.nvcc) == file
    if members:
        assert {row.arch.nvcc for row in members} == set(archs)


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("stages=3", "stage=3"), 2, "unknown field stage; the fields are mechanism, elements"),
        (("stages=3, ", ""), 2, "field stages is missing; the fields are"),
        (("stages=3", "stages=3, stages=2"), 2, "field stages is given twice"),
        (("stages=3", "stages=0"), 2, "stages is 0; a whole number above 0 is needed"),
        (("stages=3", "stages=True"), 2, "stages is True; a whole number"),
        (("bfloat16_t", "float"), 2, "elements is [half_t, float]; a list of half_t, bfloat16_t"),
        (("kFree", "kOften"), 2, "schedule is kOften; kTurns or kFree is needed"),
        (("bfloat16_t", "half_t"), 2, "a second row for sm90_block_sparse_float16_d64_skip"),
        (("kernel(", "kernels("), 2, "an entry is kernel(field=value, ...)"),
        (("kernel(", "kernel(Dense, "), 2, "an entry is kernel(field=value, ...)"),
        (("kByThreshold)", "kByThreshold"), 2, "'(' was never closed"),
    ],
)
def test_a_list_that_cannot_be_read(tmp_path, change, line, words):
    listed = tmp_path / "sm90_forward.def"
    assert ENTRY.replace(*change) != ENTRY
    listed.write_text(ENTRY.replace(*change))
    with pytest.raises(kernel_list.ListError) as error:
        kernel_list.read(listed)
    assert str(error.value).startswith(f"{listed}:{line}: {words}")


def test_a_list_is_named_by_architecture_and_pass(tmp_path):
    for name in ("sm70_forward", "sm90_sideways", "sm90"):
        listed = tmp_path / f"{name}.def"
        listed.write_text(ENTRY)
        with pytest.raises(kernel_list.ListError, match=f"{name}.def:1: the file's name is not"):
            kernel_list.read(listed)


def test_configuring_stops_at_a_list_that_cannot_be_read(configure, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "tests", "*.so"))
    listed = tree / "csrc/kernels/sm90_forward.def"
    listed.write_text(listed.read_text() + "kernel(tile_x=1)\n")
    status, output = configure("-DSPARSE_FMHA_ARCHS=none", root=tree)
    assert status != 0
    line = len(listed.read_text().splitlines())
    assert f"csrc/kernels/sm90_forward.def:{line}: unknown field tile_x" in output


def test_packages_of_an_environment_around_this_one(tmp_path, monkeypatch):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder in (inner, outer / "torch"):
        folder.mkdir(parents=True)
    (outer / "torch" / "__init__.py").touch()
    monkeypatch.setattr(locate.sysconfig, "get_path", lambda name, vars=None: str(inner))
    monkeypatch.setattr(locate.sys, "path", [])
    monkeypatch.setattr(locate.sys, "prefix", str(tmp_path))
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = false")
    assert locate._package("torch") is None
    (inner / "a.pth").write_text(f"# torch\nimport this\n{tmp_path}/not there\n\n{outer}\n")
    assert locate._package("torch") == outer / "torch"
