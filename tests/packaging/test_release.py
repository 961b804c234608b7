"""tools/release.py without a build: what it wants of a version, a machine and a wheel."""

from __future__ import annotations

import os
import re
import zipfile

import pytest
from commands import ROOT

import elf
import pythons
import release

MACHINE = os.uname().machine
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
FOUND = {"3.11": "/usr/bin/python3.11", "3.12": "/usr/bin/python3.12"}


def test_the_change_log_is_kept_as_its_form_says():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](.*)$", text, re.M)
    assert versions[0] == ("Unreleased", "")
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in versions[1:])
    numbers = [tuple(map(int, number.split("."))) for number, _ in versions[1:]]
    assert numbers == sorted(set(numbers), reverse=True)
    assert release.version_of_release() == versions[1][0]
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= SECTIONS


def test_a_version_without_changes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"  # the only place\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [1.2.2] - 2026-01-01\n")
    with pytest.raises(release.ReleaseError, match=r"no dated section for 1\.2\.3"):
        release.version_of_release()
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.3] - 2026-01-01\n")
    assert release.version_of_release() == "1.2.3"


def test_pythons_that_are_not_there():
    with pytest.raises(release.ReleaseError, match=r"no python3\.99 on PATH.*--pythons"):
        release.find_pythons(["3.99"])


def test_the_pythons_are_those_that_the_package_takes():
    floor = re.search(r'requires-python = ">=(.+?)"', (ROOT / "pyproject.toml").read_text())[1]
    assert pythons.SUPPORTED[0] == floor


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Returns a function that makes a wheel of empty files, without some and with others."""
    monkeypatch.setattr(elf, "problems", lambda path: [])
    monkeypatch.setattr(elf, "newest_versions", lambda path: {"GLIBC": (2, 14)})
    names = ["libsparse_fmha.so", "py.typed", "_C.pyi", "__init__.py"]
    names += [f"_C.cpython-{n}-{MACHINE}-linux-gnu.so" for n in (311, 312)]

    def make(without=(), extra=(), tag=f"py3-none-manylinux_2_28_{MACHINE}"):
        path = tmp_path / f"sparse_fmha-1.2.3-{tag}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in {*names, *extra} - set(without):
                archive.writestr(f"sparse_fmha/{name}", "")
        return path

    return make


def test_a_complete_wheel_passes(wheel, tmp_path, capsys):
    release.check(wheel(), "1.2.3", FOUND, tmp_path / "unpacked")
    assert "libsparse_fmha.so: GLIBC 2.14\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"without": [f"_C.cpython-312-{MACHINE}-linux-gnu.so"]}, "the wheel has .*; not .*-312-"),
        ({"without": ["libsparse_fmha.so"]}, "not .*libsparse_fmha.so"),
        ({"extra": ["libtorch_cpu.so"]}, "the wheel has .*libtorch_cpu.so"),
        ({"without": ["py.typed"]}, "the wheel has no sparse_fmha/py.typed"),
        ({"tag": "cp311-cp311-linux_x86_64"}, "the wheel is .*cp311.*py3-none-manylinux_2_28"),
    ],
)
def test_an_incomplete_wheel_is_refused(wheel, tmp_path, change, words):
    with pytest.raises(release.ReleaseError, match=words):
        release.check(wheel(**change), "1.2.3", FOUND, tmp_path / "unpacked")


def test_what_libraries_ask_is_checked(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(elf, "problems", lambda path: ["asks for GLIBC 2.34"])
    with pytest.raises(release.ReleaseError, match=r"libsparse_fmha\.so asks for GLIBC 2\.34"):
        release.check(wheel(), "1.2.3", FOUND, tmp_path / "unpacked")


def test_a_large_wheel_is_refused(wheel, tmp_path, monkeypatch):
    path = wheel()
    size = path.stat().st_size / 1e6
    monkeypatch.setattr(release, "LARGEST_MB", 0.9 * size)
    with pytest.raises(release.ReleaseError, match=r"the wheel has 0\.0 MB; at most"):
        release.check(path, "1.2.3", FOUND, tmp_path / "unpacked")
    monkeypatch.setattr(release, "LARGEST_MB", size)
    release.check(path, "1.2.3", FOUND, tmp_path / "unpacked")
