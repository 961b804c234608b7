"""pass_kv's steps, merges and gradients on one GPU, which computes for all ranks in turn."""

import pytest
import ranks_in_one_process as ranks
import torch

if not torch.distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

import sparse_fmha
from sparse_fmha import BlockMask, patterns
from sparse_fmha.distributed import Shards

pytestmark = pytest.mark.gpu

LENGTH = 4096


def mask_of(kind, q, k):
    if kind == "blocks":
        generator = torch.Generator(q.device).manual_seed(1)
        drawn = torch.rand(1, q.shape[2], 32, 32, generator=generator, device=q.device)
        blocks = (drawn < 0.3) | torch.eye(32, dtype=torch.bool, device=q.device)
        return BlockMask.from_blocks(blocks, LENGTH, LENGTH, 128, 128, causal=True)
    return patterns.vertical_slash(q, k, vertical=100, slash=200) if kind == "stripes" else None


@pytest.mark.parametrize("kind", ["dense", "causal", "blocks", "stripes"])
@pytest.mark.parametrize("layout", ["zigzag", "uneven"])
def test_all_ranks(make_qkv, randn, kind, layout):
    q, k, v = make_qkv(1, LENGTH, LENGTH, 8, 2, 128)
    dout = randn(1, LENGTH, 8, 128, seed=9)
    shards = Shards.zigzag(LENGTH, 8, 128)
    if layout == "uneven":
        shards = Shards.of_lengths([128, 0, 1920, 2048])
    mask = mask_of(kind, q, k)
    function, options = sparse_fmha.attention, {"causal": kind == "causal"}
    if mask is not None:
        options = {"mask": mask}
        function = sparse_fmha.block_sparse_attention
        if kind == "stripes":
            function = sparse_fmha.stripe_attention
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_lse=True, **options)
    expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
    found = ranks.pass_kv(q, k, v, dout, shards, mask, kind == "causal")
    # Keys' gradients are rounded once for each step.
    assert max(ranks.relative_errors(found, expected)) < 1e-2
