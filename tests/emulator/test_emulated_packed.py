"""Packed sequences on the emulator; tests/gpu/test_varlen_gpu.py has larger ones."""

import pytest
import torch
from packed_cases import Packed, clean, in_pages

import sparse_fmha
from sparse_fmha import reference, varlen_attention

BF16 = torch.bfloat16
LENGTHS = ((130, 90, 90), (1, 200, 150), (0, 20, 20), (67, 70, 0), (65, 64, 64))
CASES = {
    "dense": Packed(lengths=LENGTHS, dim=64),
    "causal": Packed(lengths=LENGTHS, dim=64, causal=True, counts_used=True, before=3, after=70),
    "a narrow head": Packed(lengths=LENGTHS, dim=40, causal=True, scale=-0.2),
    "short ones": Packed(lengths=((5, 5, 5),) * 30, dim=64, causal=True),
    "none": Packed(lengths=(), dim=64, after=9),
}
# Stages of 128 keys begin and end inside of pages.
PAGED = Packed(
    lengths=((130, 90, 90), (1, 400, 390), (0, 20, 20), (67, 70, 0), (40, 330, 330)),
    dim=64, causal=True, counts_used=True, before=3, after=70,
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_hopper():
    with sparse_fmha.arch_override("sm90"):
        yield


def check(given, inputs, mask):
    out, lse = varlen_attention(**given, return_lse=True)
    expected, expected_lse = reference.attention(*inputs, mask, scale=given["scale"])
    torch.testing.assert_close(out[None].double(), expected, rtol=0.02, atol=0.01)
    torch.testing.assert_close(lse[None].double(), expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_every_sequence_is_attention(name):
    given, mask = CASES[name].arguments(BF16)
    check(given, clean(*(given[x] for x in "qkv")), mask)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("page", [7, 16, 48, 96])
def test_pages(page, heads_first):
    """In both layouts, where the second page of each is missing."""
    given, mask = PAGED.arguments(BF16)
    paged = in_pages(given, page)
    for b, first in enumerate(PAGED.starts(1)[:-1].tolist()):
        paged["page_table"][b, 1] = 10**6
        own = slice(int(PAGED.starts(0)[b]), int(PAGED.starts(0)[b + 1]))
        mask[own, first + page : min(first + 2 * page, int(PAGED.starts(1)[b + 1]))] = False
    if heads_first:
        for x in "kv":
            paged[x] = paged[x].transpose(1, 2).contiguous().transpose(1, 2)
    check(paged, clean(*(given[x] for x in "qkv")), mask)
