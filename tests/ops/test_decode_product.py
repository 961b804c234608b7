"""Decode attention: every combination of pages, splits, new tokens, heads and ragged lengths."""

import decode_cases
import pytest
from decode_oracle import assert_as_good_as_eager

from sparse_fmha import decode_attention


@pytest.mark.parametrize("form", ["all", "blocks"])
@pytest.mark.parametrize("page", decode_cases.PAGES)
def test_all_combinations(form, page):
    for call in decode_cases.product(form, page, dim=8):
        out, lse = decode_attention(**call, return_lse=True)
        assert_as_good_as_eager(call, out, lse, 1e-5)
