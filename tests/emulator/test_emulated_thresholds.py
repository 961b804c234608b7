"""Thresholds of rows on the emulator: lists of blocks, forward and backward, against fp64."""

import pytest
import torch
from gradient_cases import CASES
from threshold_cases import check, limited

import sparse_fmha

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", ["blocks 64x16", "blocks 128x32, causal", "stripes, causal"])
def test_small(name):
    with sparse_fmha.arch_override("sm90"):  # sm80 has no thresholds
        check(*limited(CASES[name], dtype=BF16, dim=128))


def test_a_bias_is_compared_as_it_was_given():
    """Numbers next to each other, some of which are equal once they are scaled."""
    case, arguments = limited(CASES["blocks 64x16"], "one for all", BF16, dim=128)
    one = torch.tensor(1.5)
    near = torch.stack([one, torch.nextafter(one, one + 1), torch.nextafter(one, one - 1)])
    for n in ("key_bias", "row_threshold"):
        arguments[n].copy_(near[torch.arange(arguments[n].shape[-1]) % 3])
    with sparse_fmha.arch_override("sm90"):
        check(case, arguments)
