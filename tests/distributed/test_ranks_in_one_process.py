"""The harness of the GPU tests of `pass_kv`, on the CPU."""

import pytest
import ranks_in_one_process as ranks
import torch
from block_masks import Drawn

if not torch.distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

import sparse_fmha
from sparse_fmha.distributed import Shards


@pytest.mark.parametrize("kind", ["dense", "causal", "blocks", "stripes"])
@pytest.mark.parametrize(
    "shards", [Shards.zigzag(384, 4, 64), Shards.of_lengths([64, 0, 192, 128])]
)
def test_all_ranks(kind, shards):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 384, heads, 16) for heads in (4, 2, 2, 4))
    q, k, v, dout = (torch.randn(shape, generator=generator) for shape in shapes)
    mask, function, options = None, sparse_fmha.attention, {"causal": kind == "causal"}
    if kind == "blocks":
        mask = Drawn(384, 384, 64, 64, batch=1, heads=4, causal=True, seed=2).mask()
        function, options = sparse_fmha.block_sparse_attention, {"mask": mask}
    if kind == "stripes":
        mask = sparse_fmha.patterns.vertical_slash(q, k, vertical=30, slash=90, last=16)
        function, options = sparse_fmha.stripe_attention, {"mask": mask}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_lse=True, **options)
    expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
    found = ranks.pass_kv(q, k, v, dout, shards, mask, kind == "causal")
    assert max(ranks.relative_errors(found, expected)) < 1e-5
