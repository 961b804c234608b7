"""Decode calls of long caches on Hopper: both kernels are launched, and lengths choose."""

import decode_cases
import pytest
import torch
from decode_oracle import assert_as_good_as_eager

import sparse_fmha
from sparse_fmha import decode_attention

pytestmark = pytest.mark.gpu
LENGTHS = {
    "alike": ([700, 512, 0, 655] * 4, 16),
    "none": ([0] * 16, 16),
    "one long": ([3000] + [64, 0, 1] * 5, 64),
}


@pytest.fixture(autouse=True)
def hopper(cuda):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper has the kernel for few rows")


def call_of(device, batch=16, heads=8, dim=128, len_q=1):
    """Tables of more than 128k keys, so that the host cannot tell."""
    generator = torch.Generator().manual_seed(batch)
    pages = 40
    k, v = (torch.randn(pages, 64, heads, dim, generator=generator).bfloat16() for _ in "kv")
    q = torch.randn(batch, len_q, heads * 4, dim, generator=generator).bfloat16()
    table = torch.randint(pages, (batch, 2049), generator=generator).int()
    call = {"q": q, "k_cache": k, "v_cache": v, "page_table": table}
    return {name: x.to(device) for name, x in call.items()}


def run(call, lengths, tile_q=0):
    """The call with the kernel of this query tile alone, or both."""
    before = sparse_fmha._C.set_tile_q_override(tile_q)
    try:
        out = torch.full_like(call["q"], torch.nan)
        return decode_attention(**call, seq_lens=lengths, out=out, return_lse=True)
    finally:
        sparse_fmha._C.set_tile_q_override(before)


def assert_ran(results, call, lengths, kernel):
    one, other = run(call, lengths, kernel), run(call, lengths, 80 - kernel)
    for a, b in zip(results, one, strict=True):
        assert a.equal(b)
    if lengths.any():
        assert any(not a.equal(b) for a, b in zip(results, other, strict=True))


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_kernel_that_lengths_choose(cuda, name, dim):
    lengths, kernel = LENGTHS[name]
    call = call_of(cuda, dim=dim)
    lengths = decode_cases.int32(lengths)
    results = run(call, lengths.to(cuda))
    assert_ran(results, call, lengths.to(cuda), kernel)
    if dim == 64:
        given = {n: x.cpu() for n, x in call.items()}
        out, lse = (x.cpu() for x in results)
        assert_as_good_as_eager({**given, "seq_lens": lengths}, out, lse, 1e-3)


def test_a_replay_takes_the_other_kernel(cuda):
    """What follows in the stream sees the results of either."""
    call = call_of(cuda)
    lengths = torch.zeros(16, dtype=torch.int32, device=cuda)
    out = torch.empty_like(call["q"])
    run(call, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.fill_(torch.nan)
        _, lse = decode_attention(**call, seq_lens=lengths, out=out, return_lse=True)
        copies = out.clone(), lse.clone()
    for name in (*LENGTHS, *reversed(LENGTHS)):
        values, kernel = LENGTHS[name]
        lengths.copy_(decode_cases.int32(values))
        for _ in range(20):
            graph.replay()
            assert_ran(copies, call, lengths, kernel)


def test_clusters_share_heads(cuda):
    """Two to eight blocks of a cluster; queries of two tokens."""
    for batch, heads in ((2, 4), (3, 8), (4, 8), (5, 8)):
        call = call_of(cuda, batch, heads, len_q=2)
        for values, kernel in (([1900] * batch, 16), ([100000] + [1] * (batch - 1), 64)):
            lengths = decode_cases.int32(values).to(cuda)
            assert_ran(run(call, lengths), call, lengths, kernel)
