"""What patterns refuse: the message names the argument; and which integers they take."""

import re

import numpy as np
import pytest
import torch

from sparse_fmha import BlockGrid, StripeMask, patterns, selection

torch.manual_seed(0)
Q, K, V = torch.randn(2, 256, 4, 16), *torch.randn(2, 2, 256, 2, 16)
LENS = torch.tensor([200, 256], dtype=torch.int32)
ORDER = patterns.CubeOrder((4, 8, 8), (4, 4, 4))
GATE = patterns.SeerDecodeGate(4, 2, 16, gate_dim=16)
RATIOS = patterns.dhsa_ratios(Q, K)

# Each has ints in all places where its arguments may be ints.
STATIC = {
    "bigbird": dict(length=256, heads=2, global_blocks=[0, 3], random_blocks=1, seed=3),
    "longformer": dict(length=256, window=32, dilation=2, global_tokens=(0, 5), block_q=64),
    "moa": dict(q_len=256, kv_len=256, alphas=[10.0, 20.0], betas=[0.1, 0.2], min_span=128),
    "power_attention": dict(q_len=256, kv_len=256, local_blocks=2, block=128, block_kv=64),
    "power_attention_cache": dict(seq_lens=LENS, kv_len=256, local_blocks=2, block=128),
    "radial": dict(frames=4, frame_tokens=64, block=64),
    "s2_attention": dict(q_len=256, kv_len=256, heads=4, local_blocks=1, stride=2, total_heads=8),
    "streaming_llm": dict(q_len=256, kv_len=256, window=32, sink=2, block_q=64, block_kv=64),
    "svg_mask": dict(frames=4, frame_tokens=64, keep=0.5, block=64),
}
CHOSEN = {
    "anchor_attention": dict(v=V, step=2, block=64, width=100),
    "dhsa_blocks": dict(block_q=64, block_kv=32),
    "flexprefill_mask": dict(block=64, min_budget=1, max_budget=100),
    "flexprefill_query_aware": dict(block_q=64, block_kv=64),
    "hip": dict(keys=64, granule=2, local=64, sample=2, block_q=64, range_size=64),
    "minference_block_sparse": dict(top_k=2, block_q=64, block_kv=64),
    "rectified_attention": dict(v=V, text=16, block=64),
    "sol_attention": dict(v=V, block=64),
    "ssa": dict(blocks=4, block=16, block_q=64, width=20),
    "subblock": dict(piece=16, block_q=64, block_kv=64),
    "token_top_k": dict(keys=50, local=64, first=2, block_q=64, range_size=64),
    "vertical_slash": dict(vertical=30, slash=30, last_diagonals=8, range_size=64),
}
CALLS = STATIC | {name: dict(q=Q, k=K) | given for name, given in CHOSEN.items()}


def as_tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "to_dense"):
        return [result.to_dense()]
    if isinstance(result, patterns.AnchorResult):
        return [result.out, result.lse]
    return [x for x in result if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("kind", [np.int64, np.int16])
@pytest.mark.parametrize("name", CALLS)
def test_integers_of_numpy_are_as_ints(name, kind):
    def converted(value):
        if type(value) in (list, tuple):
            return type(value)(map(converted, value))
        return kind(value) if type(value) is int else value

    call = getattr(patterns, name)
    expected = as_tensors(call(**CALLS[name]))
    found = as_tensors(call(**{key: converted(value) for key, value in CALLS[name].items()}))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_narrow_integers_of_numpy_do_not_overflow():
    grid = BlockGrid(np.uint8(200), np.uint8(255), np.uint8(64), np.uint8(128))
    expected = BlockGrid(200, 255, 64, 128)
    assert grid.local(np.uint8(250)).equal(expected.local(250))
    assert all(type(x) in (int, bool) for x in (grid.q_len, grid.kv_len, grid.block_q))
    assert selection.pool_blocks(Q, np.uint8(50)).equal(selection.pool_blocks(Q, 50))


def keys():
    return patterns.SeerKeys(GATE, 2, 512)


def bounds():
    return patterns.PageBounds(32, 16, 2, 16)


TABLE = torch.arange(32, dtype=torch.int32).view(2, 16)
NEWEST = Q[:, :1]
BLOCKS = patterns.quest(NEWEST, bounds(), LENS, TABLE, budget=64)
CAUSAL = patterns.streaming_llm(256, 256, window=64)
MAP = torch.zeros(2, 4, 4, 256, dtype=torch.bool)
MODALITIES = patterns.ModalityOrder(torch.arange(256) // 99)
IN_PAGES = torch.randn(5, 2, 16)

REFUSED = [
    (TypeError, "order must be a CubeOrder, got int", lambda: patterns.draft(Q, K, 3)),
    (TypeError, "order must be a CubeOrder, got", lambda: patterns.nabla(Q, K, None)),
    (TypeError, "order must be a CubeOrder, got", lambda: patterns.cube_top_k(Q, K, "x")),
    (TypeError, "order must be a CubeOrder, got", lambda: patterns.vsa_attention(Q, K, V, 3)),
    (TypeError, "layout must be a BiFormerLayout", lambda: patterns.biformer(Q, K, 3, top_k=1)),
    (TypeError, "layout must be a LightForc", lambda: patterns.light_forcing(Q, K, None)),
    (TypeError, "order must be a Modality", lambda: patterns.mminference_boundary(Q, K, 3, {})),
    (TypeError, "mask must be a StripeMask", lambda: patterns.newest_tokens(CAUSAL, 2)),
    (TypeError, "grid must be a BlockGrid", lambda: selection.block_scores(Q, K, None)),
    (TypeError, "bounds must be a PageBounds", lambda: patterns.quest(NEWEST, None, LENS)),
    (TypeError, "gate must be a SeerDecodeGate", lambda: patterns.SeerKeys(None, 2, 512)),
    (ValueError, "gate must have a shape that broadcasts to [2, 256, 4, 16], got [2, 255",
     lambda: patterns.vsa_attention(Q, K, V, ORDER, gate=Q[:, 1:])),
    # Keys of one head would have been those of all.
    (ValueError, "k must have shape [2, tokens, 2, 16], got [2, 256, 1, 16]",
     lambda: keys().start(K[:, :, :1], LENS)),
    (ValueError, "k must have shape [2, 2, 16], got [2, 1",
     lambda: keys().write(K[:, 0, :1], LENS)),
    (TypeError, "seq_lens must be a tensor of integers", lambda: keys().start(K, [200, 256])),
    (ValueError, "positions must have shape [2]", lambda: keys().write(K[:, 0], LENS[:1])),
    (TypeError, "rows must be a tensor of integers", lambda: bounds().write(IN_PAGES, [1])),
    (ValueError, "rows must have shape [5]", lambda: bounds().write(IN_PAGES, LENS)),
    (TypeError, "k must be a tensor, got None", lambda: bounds().write(None, LENS)),
    (TypeError, "seq_lens must be a tensor of", lambda: patterns.quest(NEWEST, bounds(), [1, 2])),
    (TypeError, "blocks[1] must be a tensor of integers",
     lambda: patterns.quest_page_table((BLOCKS[0], None, 16), LENS, TABLE)),
    (ValueError, "page_table must have shape [2, pages], got [1",
     lambda: patterns.quest_page_table(BLOCKS, LENS, TABLE[:1])),
    (TypeError, "seq_lens must be a tensor", lambda: patterns.power_attention_cache([3], 256)),
    (TypeError, "positions must be a tensor", lambda: patterns.streaming_llm_cache(3)),
    (ValueError, "kv_len must be at least 0", lambda: patterns.MoaCache(-1, [1.0], [0.1])),
    (TypeError, "kv_len must be an int, got 5.5", lambda: patterns.MoaCache(5.5, [1.0], [0.1])),
    (TypeError, "alphas must be a sequence, got 3", lambda: patterns.MoaCache(512, 3, [0.1])),
    (TypeError, "cache must be a tensor", lambda: patterns.kept_rows(None, LENS)),
    (ValueError, "indices must have shape [2, 2, kept], got [2, 4, 16]",
     lambda: patterns.kept_rows(K, TABLE.view(2, 4, -1).expand(2, 4, 4).repeat(1, 1, 4))),
    (TypeError, "x must be a tensor", lambda: patterns.RegionOrder(LENS.long() * 0, 64).undo(3)),
    (TypeError, "grid must be a sequence, got 3", lambda: patterns.CubeOrder(3, (4, 4, 4))),
    (TypeError, "pairs must be a Mapping",
     lambda: patterns.mminference_boundary(Q, K, MODALITIES, 3)),
    (TypeError, "candidates must be a Mapping", lambda: patterns.search_heads(Q, K, V, [CAUSAL])),
    (TypeError, "patterns must be a Mapping", lambda: patterns.minference_attention(Q, K, V, [])),
    (TypeError, "shares must be a Mapping", lambda: patterns.psa_levels(Q, K, [0.1])),
    (TypeError, "full must be a tensor, got None", lambda: patterns.ssa_alignment(None, Q)),
    (TypeError, "theta must be a number", lambda: patterns.anchor_attention(Q, K, V, theta=None)),
    (TypeError, "step must be an int", lambda: patterns.anchor_attention(Q, K, V, step=2.0)),
    (TypeError, "tau must be a number, got None", lambda: patterns.sol_blocks(Q, K, tau=None)),
    (ValueError, "block_q must be 64 or 128, got 0", lambda: patterns.svg_mask(4, 64, block=0)),
    (TypeError, "seed must be an int, got 1.5", lambda: patterns.bigbird(256, 2, seed=1.5)),
    (ValueError, "decay must be finite and at least 0, got inf",
     lambda: patterns.radial(4, 64, decay=torch.inf)),
    (ValueError, "rope_base must be finite and at least 0, got nan",
     lambda: patterns.SeerAttentionGate(4, 2, 16, rope_base=torch.nan)),
    (ValueError, "rope_base must be above 0",
     lambda: patterns.SeerDecodeGate(4, 2, 16, rope_base=0)),
    (ValueError, "width must be at least 0, got -1",
     lambda: StripeMask.from_columns(MAP, 256, 64, width=-1)),
    (TypeError, "width must be an int, got 2.0",
     lambda: StripeMask.from_columns(MAP, 256, 64, width=2.0)),
    (ValueError, "scores must have shape [..., n]", lambda: selection.top_k_blocks(Q.sum(), 1)),
    (TypeError, "q must be a dense (strided) tensor", lambda: patterns.snapkv(Q.to_sparse(), K)),
    (TypeError, "ratios must be a dense", lambda: patterns.dhsa_boundaries(RATIOS.to_sparse(), 8)),
    (TypeError, "counts must be a dense (strided) tensor",
     lambda: StripeMask(BLOCKS[0][..., None], BLOCKS[1].to_sparse(), 1, 1, 64)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED, ids=[x[1] for x in REFUSED])
def test_bad_arguments(kind, message, call):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_lists_of_an_empty_request_have_pages():
    lens = torch.tensor([0, 33], dtype=torch.int32)
    table, left = patterns.quest_page_table(
        patterns.quest(NEWEST, bounds(), lens, TABLE, budget=64), lens, TABLE
    )
    assert left.tolist() == [[0, 0], [1, 1]]
    assert table[0].max() == -1


def test_an_empty_prompt_of_seer_keys():
    made = keys()
    made.start(K, torch.tensor([-3, 256]))
    alone = keys()
    alone.start(K, torch.tensor([0, 256]))
    assert made.compressed.equal(alone.compressed)
