"""What is in the wheel, and that it works where nothing but torch is."""

from __future__ import annotations

import re
import sys
import zipfile

from commands import ROOT, check_output

USE = """
import sys, torch, sparse_fmha
assert sparse_fmha.__file__.startswith(sys.prefix), sparse_fmha.__file__
torch.manual_seed(0)
q, k, v = (torch.randn(2, 37, 4, 40) for _ in range(3))
out = sparse_fmha.attention(q, k, v)
want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
torch.testing.assert_close(out, want.transpose(1, 2))
info = sparse_fmha.build_info()
rows = {row["name"]: row for row in sparse_fmha.kernels()}
assert any(row["arch"] == "cpu" for row in rows.values())
for name, row in rows.items():
    if row["arch"] != "cpu":
        assert row["registers"] == info["kernels"][name]["registers"]
        assert row["spill_bytes"] == 0
for figures in info["kernels"].values():  # also of what plans lists, which is no row
    assert figures["registers"] > 0
    assert figures["spill_store_bytes"] == figures["spill_load_bytes"] == 0
assert bool(info["archs"]) == bool(info["kernels"])
print(info["version"])
"""


def test_installed_wheel_computes_attention(wheel, fresh_venv, tmp_path):
    version = check_output(fresh_venv(wheel), "-c", USE, cwd=tmp_path).strip()
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_wheel_is_complete_and_small(wheel):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"sparse_fmha-[\d.]+-{python}-{python}-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 40e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "sparse_fmha/libsparse_fmha.so" in names
    assert any(re.fullmatch(r"sparse_fmha/_C\..*\.so", name) for name in names)
    sources = (ROOT / "python").rglob("*.py")
    assert {str(p.relative_to(ROOT / "python")) for p in sources} <= names
    assert {"sparse_fmha/py.typed", "sparse_fmha/_C.pyi"} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_console_script(wheel, fresh_venv, tmp_path):
    python = fresh_venv(wheel)
    program = python.parent / "sparse-fmha"
    version = check_output(python, "-c", "import sparse_fmha as s; print(s.__version__)")
    assert check_output(program, "--version", cwd=tmp_path) == f"sparse-fmha {version}"
    text = check_output(program, "info", cwd=tmp_path)
    found = [line for line in text.splitlines() if line.startswith("problem: ")]
    archs = "import sparse_fmha; print(*sparse_fmha.build_info()['archs'])"
    unused = check_output(python, "-c", archs).strip() and "torch is a CPU-only build" in text
    # A wheel with GPU kernels is also right for a torch that cannot use them; nothing else is.
    idle = "problem: cuda: GPU kernels are compiled in, but torch is a CPU-only build"
    assert found == ([idle] if unused else [])
    assert ("no problems" in text) == (not found)
