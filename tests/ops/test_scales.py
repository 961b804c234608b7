"""A scale is a number in every function: a tensor would have to be read on the host."""

import re

import pytest
import torch

import sparse_fmha

Q = torch.ones(1, 64, 2, 16)
ENDS = torch.tensor([0, 64], dtype=torch.int32)
BLOCKS = sparse_fmha.BlockMask.from_dense(torch.ones(1, 1, 64, 64, dtype=torch.bool), 64, 64)
COLUMNS = torch.zeros(1, 1, 1, 4, dtype=torch.int32)
STRIPES = sparse_fmha.StripeMask(COLUMNS, torch.ones_like(COLUMNS[..., 0]), 64, 64, 64)
PACKED = (Q[0],) * 3
CALLS = {
    "attention": lambda **x: sparse_fmha.attention(Q, Q, Q, **x),
    "neighborhood": lambda **x: sparse_fmha.neighborhood_attention(Q, Q, Q, 5, **x),
    "blocks": lambda **x: sparse_fmha.block_sparse_attention(Q, Q, Q, BLOCKS, **x),
    "stripes": lambda **x: sparse_fmha.stripe_attention(Q, Q, Q, STRIPES, **x),
    "decode": lambda **x: sparse_fmha.decode_attention(Q[:, :2], Q, Q, ENDS[1:], **x),
    "sequences": lambda **x: sparse_fmha.varlen_attention(*PACKED, ENDS, ENDS, 64, 64, **x),
    "one grid": lambda **x: sparse_fmha.varlen_neighborhood_attention(*PACKED, [(8, 8)], 3, **x),
    "grids": lambda **x: sparse_fmha.varlen_neighborhood_attention(
        *PACKED, [(32,), (4, 8)], 3, **x
    ),
}
NO_SCALES = [
    (torch.tensor(0.5), TypeError, "scale must be a finite number or None, got tensor(0.5000"),
    (torch.ones(2), TypeError, "scale must be a finite number or None, got tensor([1., 1.]"),
    (True, TypeError, "scale must be a finite number or None, got True"),
    ("a", TypeError, "scale must be a finite number or None, got 'a'"),
    (torch.inf, ValueError, "scale must be a finite number, got inf"),
    (10**400, ValueError, "scale must be a finite number, got 1000"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("scale", "kind", "message"), NO_SCALES, ids=lambda x: str(x)[:20])
def test_what_is_no_number_is_refused(call, scale, kind, message):
    with pytest.raises(kind, match="^" + re.escape(message)):
        CALLS[call](scale=scale)


@pytest.mark.parametrize("call", CALLS)
def test_numbers_of_other_types(call):
    exact = CALLS[call](scale=0.5)
    for scale in (torch.tensor(0.5).numpy()[()], 0.5):
        assert CALLS[call](scale=scale).equal(exact)
