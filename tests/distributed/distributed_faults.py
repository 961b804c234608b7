"""Cases of ranks that raise: the others end with an error that names the operation.

Each has a group of its own, which is of no use afterwards. Its timeout is made short only where
nothing but what fails is still to come.
"""

import contextlib
import datetime
import re

import pytest
import torch
import torch.distributed as dist
from distributed_inputs import block_mask, qkv
from distributed_ranks import TIMEOUT, case
from torch.distributed.device_mesh import init_device_mesh

import sparse_fmha
import sparse_fmha.distributed as sd

SHORT = datetime.timedelta(seconds=0.3)


class FaultError(Exception):
    pass


@contextlib.contextmanager
def names(operation):
    with pytest.raises(RuntimeError, match=f"^{re.escape(operation)} failed on global rank"):
        yield


def new_group(ranks):
    group = dist.new_group(list(range(ranks.world)), timeout=TIMEOUT)
    dist.barrier(group)
    return group


def shorten(group):
    dist.distributed_c10d._set_pg_timeout(SHORT, group)


@case(2, 4)
def faults_inside_ulysses(ranks):
    """The last rank's function raises; the others wait for its result."""
    parts = [ranks.part(x) for x in qkv()]
    for slices in (1, 2):
        group = new_group(ranks)

        def attention(q, k, v, group=group, **options):
            shorten(group)
            if ranks.rank == ranks.world - 1:
                raise FaultError
            return sparse_fmha.attention(q, k, v, **options)

        if ranks.rank == ranks.world - 1:
            with pytest.raises(FaultError):
                sd.ulysses(*parts, attention, slices=slices, group=group)
        else:
            with names("ulysses: the result of slice 0"):
                sd.ulysses(*parts, attention, slices=slices, group=group)


@case(2)
def faults_before_a_call(ranks):
    """A rank that never calls, with the comparison of shapes and without."""
    parts, mask = [ranks.part(x) for x in qkv()], block_mask(1, 8)
    bias = {"key_bias": ranks.part(torch.zeros(1, 1, 512), 2)}
    for call, operation, options in (
        (sd.ulysses, "the comparison of the ranks' shapes", {"validate": True}),
        (sd.ulysses, "ulysses: q, k and v of slice 0", {}),
        (sd.ulysses, "ulysses: key_bias", bias),
        (sd.all_gather_kv, "all_gather_kv: keys", {}),
        (sd.all_gather_kv, "all_gather_kv: keys of piece=0", {"slices": 2}),
        (sd.all_gather_kv, "all_gather_kv: key_bias", bias),
        (sd.pass_kv, "pass_kv: keys of step 1 of 1", {}),
        (sd.pass_kv, "plan_kv", {"mask": mask}),
    ):
        group = new_group(ranks)
        shorten(group)
        if ranks.rank == 0:
            with names(operation):
                call(*parts, **{"validate": False} | options, group=group)
    group = new_group(ranks)
    shorten(group)
    if ranks.rank == 0:
        with names("zigzag_unshard"):
            sd.zigzag_unshard(parts[0], group=group)


@case(2)
def faults_before_a_backward_pass(ranks):
    sink = torch.zeros(8, requires_grad=True)
    for call, operation, options in (
        (sd.ulysses, "ulysses: the result of slice 0, of gradients,", {}),
        (sd.ulysses, "ulysses: the result of slice 1, of gradients,", {"slices": 2}),
        (sd.all_gather_kv, "all_gather_kv: keys, of gradients,", {}),
        (sd.all_gather_kv, "all_gather_kv: keys of piece=1, of gradients,", {"slices": 2}),
        (sd.pass_kv, "pass_kv: sink, of gradients,", {"sink": sink}),
        (sd.pass_kv, "pass_kv's backward pass: keys of step 1 of 1", {}),
    ):
        group = new_group(ranks)
        parts = [ranks.part(x).requires_grad_() for x in qkv()]
        out = call(*parts, group=group, validate=False, **options)
        shorten(group)
        if ranks.rank == 0:
            with names(operation):
                out.sum().backward()


@case(4)
def faults_of_two_levels(ranks):
    """One rank never calls: its host waits in ulysses, another host for their keys."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("hosts", "ranks"))
    parts = [ranks.part(x) for x in qkv()]
    for dim in range(2):
        dist.barrier(mesh.get_group(dim))
        if dim == 0 or ranks.rank > 1:
            shorten(mesh.get_group(dim))
    if ranks.rank == 3:
        return
    late = "ulysses: q, k and v of slice 0" if ranks.rank == 2 else "pass_kv: keys of step 1 of 1"
    with names(late):
        sd.two_levels(*parts, mesh=mesh, validate=False)
