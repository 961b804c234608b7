"""Decode calls of long caches on the emulator: both kernels are launched, and lengths choose."""

import pytest
import torch
from decode_cases import int32
from decode_oracle import assert_as_good_as_eager

import sparse_fmha
from sparse_fmha import decode_attention

MULTIPROCESSORS = 72  # all groups run at a time
HEADS = 4  # of keys, in a request


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setenv("SPARSE_FMHA_EMULATOR_MULTIPROCESSORS", str(MULTIPROCESSORS))
    with sparse_fmha.arch_override("sm90"):
        yield


def call_of(lengths, by_head):
    """Tables of more than 32k keys, so that the host cannot tell."""
    generator = torch.Generator().manual_seed(1)
    batch, pages = len(lengths), 8
    k, v = (torch.randn(pages, 64, HEADS, 64, generator=generator).bfloat16() for _ in "kv")
    q = torch.randn(batch, 1, HEADS, 64, generator=generator).bfloat16()
    table = torch.randint(pages, (batch, 520), generator=generator).int()
    seq_lens = int32(lengths)
    if by_head:
        seq_lens = seq_lens[:, None].expand(batch, HEADS).contiguous()
        table = table[:, None].expand(batch, HEADS, -1)
    return {"q": q, "k_cache": k, "v_cache": v, "seq_lens": seq_lens, "page_table": table}


def run(call, tile_q=0):
    """The call with the kernel of this query tile alone, or both."""
    before = sparse_fmha._C.set_tile_q_override(tile_q)
    try:
        out = torch.full_like(call["q"], torch.nan)
        return decode_attention(**call, out=out, return_lse=True)
    finally:
        sparse_fmha._C.set_tile_q_override(before)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    ("lengths", "kernel"),
    [
        ([590, 330, 0, 465] * 4, 16),
        ([1300] + [0] * 15, 64),
        ([700, 0, 550, 299] * 2, 16),  # two blocks share a head
        ([2400] + [0] * 7, 64),
    ],
    ids=["alike", "one long", "alike, 8 requests", "one long of 8"],
)
def test_the_kernel_that_lengths_choose(lengths, kernel, by_head):
    call = call_of(lengths, by_head)
    results = run(call)
    one, other = run(call, kernel), run(call, 80 - kernel)
    for a, b in zip(results, one, strict=True):
        assert a.equal(b)
    assert any(not a.equal(b) for a, b in zip(results, other, strict=True))  # it is the other one
    assert_as_good_as_eager(call, *results, 1e-4)


def test_no_keys_at_all():
    out, lse = run(call_of([0] * 16, False))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
