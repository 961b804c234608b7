"""Every method refuses wrong q, k and v, whichever of them is wrong and how, and names one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_fmha import patterns as p
from sparse_fmha import score_sums

TOKENS, HEADS, HEADS_KV, DIM = 256, 4, 2, 16
REGION = p.image_regions(16, 16, 4)
LAYOUT, PACKING = p.BiFormerLayout(REGION), p.BiFormerPacking(REGION)
FORCING = p.LightForcingLayout(TOKENS, TOKENS, 64)
PREDICTOR = p.SparsifinerPredictor(TOKENS, HEADS, DIM)
CHUNKS = torch.arange(0, 257, 32)[None]
LEVELS = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
VERTICAL = {h: ("vertical_and_slash", 30, 100) for h in range(HEADS)}

OF_Q_AND_K = {
    "biformer": lambda q, k: p.biformer(q, k, LAYOUT, top_k=2),
    "biformer_packed": lambda q, k: p.biformer_packed(q, k, PACKING, top_k=2),
    "dhsa": lambda q, k: p.dhsa(q, k, CHUNKS, 256),
    "dhsa_blocks": p.dhsa_blocks,
    "flexprefill_mask": p.flexprefill_mask,
    "flexprefill_query_aware": p.flexprefill_query_aware,
    "hip": lambda q, k: p.hip(q, k, keys=64),
    "light_forcing": lambda q, k: p.light_forcing(q, k, FORCING),
    "minference_block_sparse": p.minference_block_sparse,
    "mminference_grid_lines": lambda q, k: p.mminference_grid_lines(q, k, (8, 16)),
    "psa_levels": p.psa_levels,
    "rectified": p.rectified,
    "score_sums": score_sums,
    "sol_blocks": p.sol_blocks,
    "sparsifiner": PREDICTOR.mask,
    "ssa": lambda q, k: p.ssa(q, k, blocks=4),
    "token_sparse_indices": lambda q, k: p.token_sparse_indices(q, k, keep=130, window=64),
    "token_top_k": lambda q, k: p.token_top_k(q, k, 64, local=64),
    "vertical_slash": lambda q, k: p.vertical_slash(q, k, vertical=30, slash=30),
}
OF_ALL = {
    "anchor_attention": lambda q, k, v: p.anchor_attention(q, k, v, step=1, block=64),
    "dma_attention": lambda q, k, v: p.dma_attention(q, k, v, torch.zeros(1, 1, TOKENS), 64),
    "minference_attention": lambda q, k, v: p.minference_attention(q, k, v, VERTICAL),
    "mminference_grid": lambda q, k, v: p.mminference_grid_attention(q, k, v, (8, 16)),
    "pka_attention": lambda q, k, v: p.pka_attention(q, k, v, (16, 16)),
    "psa_attention": lambda q, k, v: p.psa_attention(q, k, v, LEVELS),
    "rectified_attention": p.rectified_attention,
    "sol_attention": p.sol_attention,
    "ssa_attention": lambda q, k, v: p.ssa_attention(q, k, v, blocks=4),
    "token_sparse_attention": lambda q, k, v: p.token_sparse_attention(
        q, k, v, indices=torch.arange(200).expand(1, HEADS, 200)
    ),
}
DTYPE, DIM_OF_HEAD = "another dtype", "another head dim"
FAULTS = {
    "no tensor": lambda x: None,
    "a list": lambda x: x.tolist(),
    "integers": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    DTYPE: lambda x: x.double(),
    "no batch": lambda x: x[0],
    "one axis more": lambda x: x[None],
    "another batch": lambda x: x.repeat(3, 1, 1, 1),
    "heads that do not divide": lambda x: x.repeat(1, 1, 3, 1)[:, :, : x.shape[2] + 1],
    DIM_OF_HEAD: lambda x: torch.cat([x, x], 3),
    "another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
}


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, TOKENS, h, DIM) for h in (HEADS, HEADS_KV, HEADS_KV)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", [*OF_Q_AND_K, *OF_ALL])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_wrong_tensors_are_refused(name, data):
    some = inputs()[: 2 if name in OF_Q_AND_K else 3]
    wrong = data.draw(st.integers(0, len(some) - 1))
    # Choices alone take q and k of two dtypes, as they compute in fp32.
    mixed = name in OF_Q_AND_K and name != "sparsifiner"
    faults = {*FAULTS} - ({DTYPE} if mixed else set())
    if name == "dma_attention" and wrong == 2:
        faults.remove(DIM_OF_HEAD)  # values may have one of their own
    fault = data.draw(st.sampled_from(sorted(faults)))
    some[wrong] = FAULTS[fault](some[wrong])
    with pytest.raises((ValueError, TypeError), match=r"\b(q|k|v|x|values)\b"):
        (OF_Q_AND_K | OF_ALL)[name](*some)


@pytest.mark.parametrize("name", OF_ALL)
def test_values_of_another_length_are_refused(name):
    q, k, v = inputs()
    with pytest.raises((ValueError, TypeError), match=r"\bv\b"):
        OF_ALL[name](q, k, v[:, 1:])


@pytest.mark.parametrize("name", [*OF_Q_AND_K, *OF_ALL])
def test_right_tensors_are_taken(name):
    some = inputs()[: 2 if name in OF_Q_AND_K else 3]
    (OF_Q_AND_K | OF_ALL)[name](*some)
