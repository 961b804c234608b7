"""Which architecture's kernels a GPU runs: one table, and an error for what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import sparse_fmha
from sparse_fmha import _C

STATUSES = {"measured", "ran", "compiled"}


def test_a_capability_has_one_architecture():
    table = _C.gpu_archs()
    assert table
    listed = [capability for capabilities in table.values() for capability in capabilities]
    assert len(set(listed)) == len(listed)
    for arch, capabilities in table.items():
        assert capabilities
        assert {_C.arch_of_capability(*capability) for capability in capabilities} == {arch}


@pytest.mark.parametrize("capability", [(9, 1), (10, 1), (0, 9)])
def test_a_capability_without_a_row_names_the_rows(capability):
    with pytest.raises(RuntimeError) as error:
        _C.arch_of_capability(*capability)
    first, *rows = str(error.value).splitlines()
    assert "compute capability {}.{} is not supported".format(*capability) in first
    expected = {f"  {a}.{b} ({arch})" for arch, gpus in _C.gpu_archs().items() for a, b in gpus}
    assert set(rows) == expected


def test_rows_are_for_architectures_of_the_table():
    archs = {row["arch"] for row in sparse_fmha.kernels()}
    assert archs <= {"cpu", *_C.gpu_archs()}


def test_every_device_of_an_architecture_has_a_status():
    for arch, capabilities in _C.gpu_archs().items():
        status = _C.arch_status(arch)
        assert {f"{major}.{minor}" for major, minor in capabilities} <= set(status)
        assert set(status.values()) <= STATUSES
    assert _C.arch_status("sm90") == {"9.0": "measured"}
    for row in sparse_fmha.kernels():
        assert row.get("status") == (None if row["arch"] == "cpu" else _C.arch_status(row["arch"]))


def test_what_never_ran_is_refused_until_it_is_allowed():
    sparse_fmha.allow_untested(False)
    assert _C.arch_for_call(9, 0) == "sm90"
    message = r"sm80 were compiled for compute capability 8\.0, but never run .*allow_untested\(\)"
    with pytest.raises(RuntimeError, match=message):
        _C.arch_for_call(8, 0)
    sparse_fmha.allow_untested()
    try:
        assert _C.arch_for_call(8, 0) == "sm80"
        assert _C.arch_for_call(12, 0) == "sm86"
        with pytest.raises(RuntimeError, match=r"capability 7\.5 is not supported"):
            _C.arch_for_call(7, 5)
    finally:
        sparse_fmha.allow_untested(False)
    with pytest.raises(RuntimeError, match="never run"):
        _C.arch_for_call(8, 6)


@pytest.mark.parametrize(("value", "allowed"), [("1", True), ("0", False), ("", False)])
def test_the_environment_allows_it_too(value, allowed):
    code = "from sparse_fmha import _C; print(_C.arch_for_call(8, 9))"
    environment = {**os.environ, "SPARSE_FMHA_ALLOW_UNTESTED": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) == allowed
    assert "sm86" in done.stdout if allowed else "never run on such a GPU" in done.stderr


def test_an_override_is_for_devices_that_run_the_kernels():
    with sparse_fmha.arch_override("sm80"):
        assert _C.arch_for_call(9, 0) == "sm80"
        with sparse_fmha.arch_override("sm86"):
            assert _C.arch_for_call(8, 0) == "sm86"
        assert _C.arch_override() == "sm80"
        with pytest.raises(RuntimeError) as error:
            _C.arch_for_call(8, 6)
        first, *rows = str(error.value).splitlines()
        assert "compute capability 8.6 does not run these kernels" in first
        assert {"  9.0 (sm80)", "  8.6 (sm86)"} <= set(rows)
    assert _C.arch_override() is None
    with pytest.raises(ValueError, match="arch must be"), sparse_fmha.arch_override("sm70"):
        pass


class OnGpu(torch.Tensor):
    @property
    def device(self):
        return torch.device("cuda", 0)


def on_gpu():
    return torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cpu").as_subclass(OnGpu)


@pytest.mark.parametrize(
    ("capability", "arch", "note"),
    [
        ((9, 0), "sm90", None),
        ((8, 9), "sm86", "sm86 was never run on compute capability 8.9"),
        (
            (10, 0),
            "sm80",
            "cuDNN's dense attention is faster on compute capability 10.0 until fewer than about "
            "a quarter of the pairs are seen",
        ),
    ],
)
def test_explain_says_what_is_not_measured(monkeypatch, capability, arch, note):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = sparse_fmha.explain(sparse_fmha.attention, *[on_gpu()] * 3)
    assert found.arch == arch
    assert found.predicted_ms is None or arch == "sm90"
    assert note in found.notes if note else not found.notes
    with sparse_fmha.arch_override("sm80"):
        assert sparse_fmha.explain(sparse_fmha.attention, *[on_gpu()] * 3).arch == "sm80"


def test_explain_takes_the_architecture_of_the_device(monkeypatch):
    q = on_gpu()
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sparse_fmha.explain(sparse_fmha.attention, q, q, q).arch == "sm90"
    capability = (7, 5)
    with pytest.raises(RuntimeError, match=r"capability 7\.5"):
        sparse_fmha.explain(sparse_fmha.attention, q, q, q)
