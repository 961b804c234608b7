"""Runs cases in several processes: one start of the processes for all cases of a number of ranks.

A case is a function of `Ranks` that asserts; `case(2, 4)` says on how many ranks it runs.
"""

import datetime
import importlib
import json
import multiprocessing
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MODULES = (
    "distributed_ulysses",
    "distributed_all_gather",
    "distributed_cases",
    "distributed_errors",
    "distributed_dtensor",
    "distributed_backward",
    "distributed_overlap",
    "distributed_pass_kv",
    "distributed_two_levels",
    "distributed_additions",
    "distributed_heads",
    "distributed_faults",
    "distributed_fsdp",
)
TIMEOUT = datetime.timedelta(seconds=40)

_cases = {}


def case(*worlds):
    def register(function):
        _cases[function.__name__] = (function, worlds)
        return function

    return register


def cases():
    """(name, world) of all cases."""
    for module in MODULES:
        importlib.import_module(module)
    return [(name, world) for name, (_, worlds) in _cases.items() for world in worlds]


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int

    def part(self, x, dim=1):
        """This rank's tokens of a whole sequence."""
        return x.chunk(self.world, dim)[self.rank]

    def same(self, part, whole, dim=1, **tolerance):
        """This rank's part is that of the whole result, to rounding."""
        tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(part, self.part(whole, dim), **tolerance)


def run(world, names, folder):
    """The tracebacks of each case named, one for each rank, None where it passed."""
    # The server imports once for all processes, of which none starts threads before it is forked.
    multiprocessing.set_forkserver_preload(["torch", "sparse_fmha.distributed"])
    mp.start_processes(
        _work, (world, names, str(folder)), nprocs=world, start_method="forkserver"
    )  # fmt: skip
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return {name: [found[name] for found in ranks] for name in ranks[0]}


def _work(rank, world, names, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=TIMEOUT
    )
    cases()  # imports them
    found = {}
    for name in names:
        try:
            _cases[name][0](Ranks(rank, world))
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        try:
            dist.barrier()
        except RuntimeError:  # one rank failed where the others still waited for it
            found |= {other: f"not run after {name}" for other in names if other not in found}
            break
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()
