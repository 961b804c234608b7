"""Sequence parallel attention and DTensor on 2 and 4 processes, against one process."""

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

import distributed_ranks

import sparse_fmha
import sparse_fmha.distributed as sd


@pytest.fixture(scope="session")
def outcome(tmp_path_factory):
    """outcome(name, world): the tracebacks of a case; all cases of a world run at once."""
    found = {}

    def of(name, world):
        if world not in found:
            found[world] = distributed_ranks.run(world, tmp_path_factory.mktemp(f"world{world}"))
        return found[world][name]

    return of


@pytest.mark.parametrize(("name", "world"), distributed_ranks.cases())
def test_case(outcome, name, world):
    failures = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcome(name, world)) if text]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("call", [sd.ulysses, sd.all_gather_kv])
def test_without_process_group(call):
    q = torch.randn(1, 64, 2, 8)
    with pytest.raises(RuntimeError, match="init_process_group first"):
        call(q, q, q)


@pytest.mark.parametrize("call", [sd.zigzag_shard, sd.zigzag_unshard])
def test_zigzag_without_process_group(call):
    with pytest.raises(RuntimeError, match="init_process_group first"):
        call(torch.arange(8), 0)


def test_is_imported_only_when_asked_for():
    import subprocess
    import sys

    script = "import sys, sparse_fmha; assert 'sparse_fmha.distributed' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_register_sharding_again_does_nothing(monkeypatch):
    def refuse(op):
        raise AssertionError(f"{op} is registered again")

    monkeypatch.setattr("sparse_fmha.distributed._dtensor.register_with_torch", refuse)
    sd.register_sharding()
    assert sparse_fmha.distributed is sd
