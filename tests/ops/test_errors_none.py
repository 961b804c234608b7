"""None in place of q, k or v is refused by name, on every path to an op."""

import pytest
import torch

import sparse_fmha
from sparse_fmha import patterns

X = torch.randn(1, 128, 2, 16)
BLOCKS = patterns.streaming_llm(128, 128, window=64)
STRIPES = patterns.vertical_slash(X, X, vertical=30, slash=30)
ROWS = torch.arange(9).view(1, 1, 9)
BIAS = torch.zeros(1, 1, 128)
CALLS = {
    "attention": sparse_fmha.attention,
    "neighborhood": lambda q, k, v, **given: sparse_fmha.neighborhood_attention(
        q, k, v, 5, **given
    ),
    "blocks": lambda q, k, v, **given: sparse_fmha.block_sparse_attention(q, k, v, BLOCKS, **given),
    "stripes": lambda q, k, v, **given: sparse_fmha.stripe_attention(q, k, v, STRIPES, **given),
    "rows": lambda q, k, v: sparse_fmha.row_attention(q, k, v, ROWS),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("missing", range(3))
@pytest.mark.parametrize("name", CALLS)
def test_none_is_refused_by_name(name, missing, biased):
    given = {"key_bias": BIAS} if biased and name != "rows" else {}
    some = [X, X, X]
    some[missing] = None
    with pytest.raises(TypeError, match=f"{'qkv'[missing]} must be a tensor, got None"):
        CALLS[name](*some, **given)
