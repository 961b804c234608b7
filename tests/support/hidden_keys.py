"""Keys that no query sees, and what they may hold."""

import torch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask

PADDED, HELD = 300, 240  # tokens, and those of them that hold data


def _lists():
    """Masks whose blocks, or runs, also have keys that nobody sees."""
    seen = torch.arange(PADDED) < HELD
    pairs = seen.expand(1, 1, PADDED, PADDED)
    columns = seen.expand(1, 1, 3, PADDED)
    return {
        "partial blocks": lambda device: BlockMask.from_dense(pairs.to(device), 128, 128),
        "columns": lambda device: StripeMask.from_columns(columns.to(device), PADDED, 128),
    }


LISTS = _lists()


def check(name, device, dtype):
    """NaN in the k of hidden keys changes nothing, to the bit, once their v is 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, PADDED, 2, 64, generator=generator) for _ in range(3))
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    mask = LISTS[name](device)
    attend = sparse_fmha.block_sparse_attention
    if isinstance(mask, StripeMask):
        attend = sparse_fmha.stripe_attention
    for threshold in (0.0, 0.01):
        options = {"skip_threshold": threshold, "return_lse": True}
        v[:, HELD:] = 0
        k[:, HELD:] = 1
        expected = attend(q, k, v, mask, **options)
        for junk in (float("nan"), float("inf"), -float("inf")):
            k[:, HELD:] = junk
            for a, b in zip(attend(q, k, v, mask, **options), expected, strict=True):
                assert a.equal(b)
