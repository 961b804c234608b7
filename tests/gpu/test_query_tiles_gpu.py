"""Kernels of dense and causal attention that differ in their query tile.

A call chooses among them by a model, which tests/host/test_choose_row.py has.
"""

import contextlib

import other_archs
import pairwise
import pytest
import torch
from packed_cases import LENGTHS, Packed, clean, in_pages, on_device

import sparse_fmha

_C = pytest.importorskip("sparse_fmha._C")
pytestmark = pytest.mark.gpu

TILES = (64, 128, 192)


@contextlib.contextmanager
def tiles_of(rows):
    before = _C.set_tile_q_override(rows)
    try:
        yield
    finally:
        _C.set_tile_q_override(before)


@pytest.fixture(autouse=True)
def hopper(cuda):
    if other_archs.in_use() != "sm90":
        pytest.skip("the other architectures have no choice")


@pytest.fixture(params=TILES)
def tile_q(request):
    with tiles_of(request.param):
        yield request.param


def kernels_of(function):
    """The names of the attention kernels that it runs."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages() if "attention_kernel" in event.key}


def test_the_override_runs_other_kernels(make_qkv):
    for dim in (64, 128):
        q, k, v = make_qkv(1, 300, 300, 2, 2, dim)
        names = []
        for tile, *_ in _C.row_times(False, dim, 2, 300, 300):
            with tiles_of(tile):
                found = kernels_of(lambda: sparse_fmha.attention(q, k, v))  # noqa: B023
            if not found:
                pytest.skip("torch's profiler sees no kernels here")
            (name,) = found
            assert f"(int){dim}, (int){tile}," in name or f", {dim}, {tile}," in name
            names.append(name)
        assert len(set(names)) == len(names) > 1


@pairwise.parametrize(
    tile=TILES,
    dtype=(torch.float16, torch.bfloat16),
    dim=(8, 64, 72, 128),
    lengths=[(1, 1), (63, 65), (64, 64), (129, 128), (197, 197), (577, 577), (1000, 1000),
             (200, 90), (90, 200), (700, 64), (1, 777), (777, 1)],
    heads=[(2, 2), (6, 2), (5, 1)],
    causal=(False, True),
)  # fmt: skip
def test_shapes(make_qkv, attend, agrees, tile, dtype, dim, lengths, heads, causal):
    q, k, v = make_qkv(2, *lengths, *heads, dim, dtype)
    with tiles_of(tile):
        agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_more_tiles_than_the_gpu_runs_at_once(make_qkv, attend, agrees, tile_q, dim, causal):
    """One tile for each thread block in the first case, several in the second."""
    for batch, length in ((1, 700), (3, 1025)):
        q, k, v = make_qkv(batch, length, 900, 40, 8, dim)
        agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pairwise.parametrize(
    tile=TILES,
    dim=(64, 128),
    length=(1, 15, 63, 64, 65, 79, 80, 81, 127, 128, 129, 191, 192, 257),
)
def test_tile_borders(make_qkv, attend, agrees, tile, dim, length):
    for lengths in ((length, 193), (193, length)):
        for causal in (False, True):
            q, k, v = make_qkv(1, *lengths, 2, 2, dim)
            with tiles_of(tile):
                agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("scale", [0.0, -0.125, 1.0, 1e-40, -3.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_scale(make_qkv, attend, agrees, tile_q, dim, scale):
    for causal in (False, True):
        q, k, v = make_qkv(2, 257, 300, 2, 1, dim)
        agrees(*attend(q, k, v, causal=causal, scale=scale), q, k, v, causal, scale)


@pytest.mark.parametrize("dim", [64, 128])
def test_rows_without_keys(make_qkv, attend, tile_q, dim):
    q, k, v = make_qkv(2, 640, 64, 2, 2, dim)
    out, lse = attend(q, k, v, causal=True)
    assert out[:, :576].eq(0).all()
    assert lse[:, :576].eq(-torch.inf).all()


@pytest.mark.parametrize("dim", [64, 128])
def test_rising_scores(make_qkv, attend, agrees, tile_q, dim):
    """Each key tile has larger scores than those before it, so references move."""
    q, k, v = make_qkv(1, 300, 1000, 2, 2, dim)
    rise = torch.linspace(20, 0, 1000, device=q.device).view(1, -1, 1, 1)  # visited from the end
    q, k = q.abs(), (k.abs() * rise).to(k.dtype)
    for causal in (False, True):
        agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page", [None, 48])
def test_packed_sequences(cuda, agrees, tile_q, causal, page):
    case = Packed(lengths=LENGTHS, dim=128, causal=causal, after=70)
    given, mask = case.arguments(torch.bfloat16)
    inputs = clean(*(given[x].to(cuda) for x in "qkv"))
    given = on_device(given if page is None else in_pages(given, page), cuda)
    out, lse = sparse_fmha.varlen_attention(**given, return_lse=True)
    agrees(out[None], lse[None], *inputs, visible=mask.to(cuda))
