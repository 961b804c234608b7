"""All block and stripe methods for sequences over packed documents, token by token."""

import inspect

import pytest
import torch

from sparse_fmha import (
    BlockMask,
    block_sparse_attention,
    patterns,
    reference,
    stripe_attention,
)

SIZES = (200, 1, 0, 315, 128, 124)
LENGTH, HEADS = sum(SIZES), 4
GATE = patterns.SeerAttentionGate(HEADS, 2, 16, gate_dim=16)
BLOCKS = {
    "bigbird": lambda _q, _k: patterns.bigbird(LENGTH, HEADS, block=64, block_q=64, block_kv=64),
    "longformer": lambda _q, _k: patterns.longformer(LENGTH, window=100, global_tokens=(3,)),
    "streaming_llm": lambda _q, _k: patterns.streaming_llm(LENGTH, LENGTH, window=150),
    "moa": lambda _q, _k: patterns.moa(
        LENGTH, LENGTH, [64.0, 128.0, 0.0, 300.0], [0.1, 0.2, 0.3, 0.0], block_q=64, block_kv=64
    ),
    "s2_attention": lambda _q, _k: patterns.s2_attention(
        LENGTH, LENGTH, HEADS, local_blocks=2, stride=3, block_q=64, block_kv=64
    ),
    "power_attention": lambda _q, _k: patterns.power_attention(
        LENGTH, LENGTH, local_blocks=1, block=64, block_q=64, block_kv=64
    ),
    "minference_block_sparse": lambda q, k: patterns.minference_block_sparse(q, k, top_k=3),
    "flexprefill_query_aware": lambda q, k: patterns.flexprefill_query_aware(q, k, gamma=0.7),
    "flexprefill_mask": lambda q, k: patterns.flexprefill_mask(q, k, gamma=0.7),
    "dhsa_blocks": lambda q, k: patterns.dhsa_blocks(q, k, density=0.4),
    "ssa": lambda q, k: patterns.ssa(q, k, blocks=3),
    "subblock": lambda q, k: patterns.subblock(q, k, keep=0.4),
    "documents": lambda _q, _k: patterns.documents(torch.tensor([0, LENGTH]).int(), window=90),
    "SeerAttentionGate": lambda q, k: GATE.mask(q, k, top_k=3),
}
STRIPES = {
    "dhsa": lambda q, k: patterns.dhsa(
        q, k, torch.arange(0, LENGTH + 1, 32)[None], 150, local=64, first=16
    ),
    "hip": lambda q, k: patterns.hip(q, k, keys=128, local=64),
    "token_top_k": lambda q, k: patterns.token_top_k(q, k, 100),
    "vertical_slash": lambda q, k: patterns.vertical_slash(q, k, vertical=60, slash=80),
}
# For images, videos and several modalities, whose samples have calls of their own; made from lists
# of others; or names of parts of methods that are above.
OTHERS = {
    "CubeOrder", "ModalityOrder", "SparsifinerPredictor", "biformer", "biformer_packed",
    "cube_top_k", "dma_mask", "draft", "join_heads", "light_forcing", "mminference_boundary",
    "nabla", "radial", "svg_mask", "token_top_k_mask", "vertical_slash_mask",
}  # fmt: skip


def returns_a_mask(name):
    made = getattr(patterns, name)
    call = getattr(made, "mask", None) if inspect.isclass(made) else made
    return inspect.isfunction(call) and "Mask" in str(inspect.signature(call).return_annotation)


def test_all_methods_are_here():
    assert {name for name in patterns.__all__ if returns_a_mask(name)} == {
        *BLOCKS,
        *STRIPES,
        *OTHERS,
    }


def drawn(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, LENGTH, HEADS, 16, generator=generator)
    k, v = torch.randn(2, 1, LENGTH, 2, 16, generator=generator)
    document = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    return [x.to(dtype) for x in (q, k, v)], document


def check(out, lse, tensors, seen):
    """Rows that see nothing have out 0 and lse -inf there, too."""
    exact, exact_lse = reference.attention(*tensors, seen)
    torch.testing.assert_close(out, exact.to(out.dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks_are_cut_at_documents(name):
    (q, k, v), document = drawn()
    mask = BLOCKS[name](q, k)
    cu = torch.tensor([0, *SIZES]).cumsum(0).int()
    cut = BlockMask.from_documents(cu, mask.block_q, mask.block_kv) & mask
    assert cut.causal is mask.causal
    out, lse = block_sparse_attention(q, k, v, cut, return_lse=True)
    seen = mask.to_dense() & (document[:, None] == document)
    assert cut.to_dense().equal(seen.expand_as(cut.to_dense()))
    check(out, lse, (q, k, v), seen)


@pytest.mark.parametrize("name", STRIPES)
@torch.no_grad()
def test_stripes_are_cut_at_documents(name):
    (q, k, v), document = drawn()
    mask = STRIPES[name](q, k)
    assert mask.causal
    bias = document.float()[None, None] * 2**-20
    given = {"key_bias": bias, "row_threshold": bias}
    out, lse = stripe_attention(q, k, v, mask, **given, return_lse=True)
    seen = mask.to_dense() & (document[:, None] == document)
    check(out, lse - bias.mT, (q, k, v), seen)
