"""Kernels for other GPUs on this one. SPARSE_FMHA_TEST_ARCH runs all GPU tests with them."""

import other_archs
import pytest
import torch
from block_lists import Case
from block_lists import attend as attend_lists
from gradient_cases import LARGE
from gradient_rule import assert_as_good_as_torch, output_gradients
from poison import poisoned

import sparse_fmha
from sparse_fmha import StripeMask, reference

pytestmark = pytest.mark.gpu

HEAD_DIMS = (8, 64, 96, 128, 256)


@pytest.fixture(params=sorted(other_archs.LACKING))
def arch(cuda, request):
    if request.param not in {row["arch"] for row in sparse_fmha.kernels()}:
        pytest.skip(f"this build has no kernels of {request.param}")
    with sparse_fmha.arch_override(request.param):
        yield request.param


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(arch, make_qkv, attend, agrees, dim, causal):
    for lengths in ((1, 1), (300, 411), (777, 130)):
        q, k, v = make_qkv(2, *lengths, 4, 2, dim)
        agrees(*attend(q, k, v, causal=causal), q, k, v, causal)
    assert sparse_fmha.explain(sparse_fmha.attention, q, k, v).kernel.startswith(f"{arch}_dense_")


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((500,), {"window": 100, "causal": True}),
        ((20, 33), {"window": (5, 9), "stride": (2, 1), "dilation": (2, 3)}),
        ((7, 12, 16), {"window": (3, 6, 16), "stride": (3, 1, 8)}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_neighborhoods(arch, randn, attend, agrees, grid, options, dim):
    q = randn(2, *grid, 4, dim)
    k, v = (randn(2, *grid, 2, dim, seed=seed) for seed in (1, 2))
    extra = {f"extra_{x}": randn(2, 70, 2, dim, seed=seed) for seed, x in enumerate("kv", 3)}
    out, lse = attend(q, k, v, **options, **extra)
    k, v = (
        torch.cat([a.flatten(1, -3), b], 1) for a, b in zip((k, v), extra.values(), strict=True)
    )
    visible = reference.neighborhood_mask(grid, extra=70, device=q.device, **options)
    agrees(out, lse, q, k, v, visible=visible)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("blocks", [(64, 16), (64, 64), (128, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_block_lists(arch, make_qkv, agrees, blocks, causal, dim):
    lists = Case(300, 411, blocks, 0.4, 0.2, causal, batch=2, dim=dim).lists()
    q, k, v = make_qkv(*lists.case.sizes())
    agrees(*attend_lists(lists, q, k, v), q, k, v, visible=lists.visible().to(q.device))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("block_q", [128, 192])
def test_stripes(arch, make_qkv, agrees, block_q, dim):
    q, k, v = make_qkv(1, 500, 500, 4, 2, dim)
    groups = -(-500 // block_q)
    drawn = torch.rand(1, 1, groups, 500, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = StripeMask.from_columns(drawn, 500, block_q, causal=True)
    with poisoned():
        out, lse = sparse_fmha.stripe_attention(q, k, v, mask.to(q.device), return_lse=True)
    agrees(out, lse, q, k, v, visible=mask.to_dense().to(q.device))


@pytest.mark.parametrize("dim", HEAD_DIMS[1:])
@pytest.mark.parametrize("name", LARGE)
def test_gradients(arch, cuda, name, dim):
    """test_backward_gpu.py has more, for one architecture at a time."""
    case = LARGE[name]
    arguments = case.arguments(torch.bfloat16, cuda, dim)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout)
    assert_as_good_as_torch(case, arguments, found, dout, lse)


def test_what_is_lacking_raises(arch, make_qkv):
    q, k, v = make_qkv(1, 128, 128, 2, 2, 64)
    with pytest.raises(RuntimeError, match=f"arch={arch}, .*with skipping"):
        sparse_fmha.attention(q, k, v, skip_threshold=0.1)
    with pytest.raises(RuntimeError, match=f"arch={arch}, .*with key_bias"):
        sparse_fmha.attention(q, k, v, key_bias=torch.zeros(1, 1, 128, device=q.device))


def test_the_override_ends(cuda):
    before = other_archs.in_use()
    with sparse_fmha.arch_override("sm86"):
        assert other_archs.in_use() == "sm86"
    assert other_archs.in_use() == before
