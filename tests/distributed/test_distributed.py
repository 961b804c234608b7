"""Sequence parallel attention and DTensor on 2 and 4 processes, against one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

import distributed_ranks

import sparse_fmha
import sparse_fmha.distributed as sd


@pytest.fixture(scope="session")
def outcome(tmp_path_factory, request):
    """outcome(name, world): the tracebacks of a case; all selected cases of a world run at once."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [call.params for call in calls if call and {"name", "world"} == set(call.params)]
    found = {}

    def of(name, world):
        if world not in found:
            names = [params["name"] for params in chosen if params["world"] == world]
            folder = tmp_path_factory.mktemp(f"world{world}")
            found[world] = distributed_ranks.run(world, names, folder)
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
    script = "import sys, sparse_fmha; assert 'sparse_fmha.distributed' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_register_sharding_again_does_nothing(monkeypatch):
    def refuse(schema):
        raise AssertionError(f"{schema} is registered again")

    monkeypatch.setattr("sparse_fmha.distributed._dtensor._strategy_of", refuse)
    sd.register_sharding()
    assert sparse_fmha.distributed is sd


def test_example():
    """As its docstring says to run it."""
    script = Path(__file__).parents[2] / "examples" / "two_processes.py"
    done = subprocess.run(
        [sys.executable, script, "--length", "512"], capture_output=True, text=True, check=True
    )
    # Gloo may have said something before.
    errors = [float(line.split()[-1]) for line in done.stdout.splitlines()[-6:]]
    assert max(errors) < 1e-5
    wrong = subprocess.run(
        [sys.executable, script, "--length", "100"], capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stderr) == (
        2, "error: --length must be a multiple of 256, got 100\n"
    )  # fmt: skip
