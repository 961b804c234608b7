"""Which architecture's kernels a GPU runs: one table, and an error for what it lacks."""

from __future__ import annotations

import pytest
import torch

import sparse_fmha
from sparse_fmha import _C


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


def test_explain_takes_the_architecture_of_the_device(monkeypatch):
    class OnGpu(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 0)

    q = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cpu").as_subclass(OnGpu)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sparse_fmha.explain(sparse_fmha.attention, q, q, q).arch == "sm90"
    capability = (7, 5)
    with pytest.raises(RuntimeError, match=r"capability 7\.5"):
        sparse_fmha.explain(sparse_fmha.attention, q, q, q)
