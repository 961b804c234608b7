"""Sinks on the GPU, which need no kernel of their own."""

import bias_oracle
import pytest
import torch
from gradient_oracle import mask_of

import sparse_fmha

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sink(make_qkv, randn, dtype):
    given = [x.requires_grad_() for x in make_qkv(2, 300, 300, 4, 2, 64, dtype=dtype)]
    sink = randn(4, dtype=torch.float32, seed=9).requires_grad_()
    found = sparse_fmha.attention(*given, causal=True, sink=sink, return_lse=True)
    mask = mask_of("fmha", {"q": given[0], "k": given[1], "causal": True})
    expected = bias_oracle.attend(*given, mask, sink=sink)
    eps = torch.finfo(dtype).eps
    assert (found[0] - expected[0]).abs().max() <= 2 * eps * expected[0].abs().max() + 1e-5
    torch.testing.assert_close(found[1].double(), expected[1], rtol=2e-6, atol=1e-5)
    ours = torch.autograd.grad(found[0].float().sum(), [*given, sink])
    for a, b in zip(ours, torch.autograd.grad(expected[0].sum(), [*given, sink]), strict=True):
        assert (a - b).abs().max() <= 16 * eps * b.abs().max()
