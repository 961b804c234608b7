"""Lists of key blocks drawn at random, as numpy arrays of one batch entry and head."""

import numpy as np
import torch
from hypothesis import strategies as st

from sparse_fmha import reference


def packed(masks):
    """Bitmasks [..., block_q, block_kv] as bytes, the lowest bit first."""
    return np.packbits(masks, axis=-1, bitorder="little")


@st.composite
def problems(draw, block_q, block_kv, longest=500):
    len_q = draw(st.integers(1, 400))
    len_kv = draw(st.integers(1, longest))
    blocks_q, blocks_kv = -(-len_q // block_q), -(-len_kv // block_kv)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    kind = rng.choice(3, (blocks_q, blocks_kv), p=draw(st.sampled_from(
        [(0.5, 0.3, 0.2), (0.9, 0.1, 0.0), (0.0, 1.0, 0.0), (0.4, 0.0, 0.6), (1.0, 0.0, 0.0)]
    )))  # fmt: skip
    if draw(st.booleans()) and blocks_q > 1:
        kind[1::2] = kind[0::2][: len(kind[1::2])]  # pairs of query blocks with one list
    lists = {}
    for value, name in ((1, "full"), (2, "partial")):
        width = draw(st.integers(0, 2)) + max(1, int((kind == value).sum(-1).max(initial=0)))
        counts = np.zeros(blocks_q, dtype=np.int32)
        indices = np.full((blocks_q, width), -7, dtype=np.int32)  # garbage behind the count
        for i, row in enumerate(kind):
            listed = rng.permutation(np.flatnonzero(row == value))
            counts[i] = len(listed)
            indices[i, : len(listed)] = listed
        lists[name] = (counts, indices)
    masks = rng.random((*lists["partial"][1].shape, block_q, block_kv)) < 0.5
    return dict(
        len_q=len_q,
        len_kv=len_kv,
        block_q=block_q,
        block_kv=block_kv,
        causal=draw(st.booleans()),
        **lists,
        masks=masks,
    )


def visible(p):
    """Which query sees which key, by the reference."""
    problem = [p[name] for name in ("len_q", "len_kv", "block_q", "block_kv")]
    (counts, indices), (partial_counts, partial_indices) = (
        [torch.from_numpy(x)[None, None] for x in p[name]] for name in ("full", "partial")
    )
    return reference.block_sparse_mask(
        counts,
        indices,
        *problem,
        partial_counts,
        partial_indices,
        torch.from_numpy(p["masks"])[None, None],
        causal=p["causal"],
    )[0, 0].numpy()
