"""What decode attention refuses: the message names the argument, its value and what is allowed."""

import re

import decode_cases
import pytest
import torch

from sparse_fmha import decode_attention

int32 = decode_cases.int32
ONES = torch.ones(2, dtype=torch.int32)
BLOCKS = int32([[[0]], [[0]]]), int32([[1], [1]]), 16
TOKENS = int32([[[[0]]], [[[0]]]]), None
SPANS = {"head_starts": int32([[0, 0]] * 2), "head_lengths": int32([[1, 1]] * 2)}
OPERANDS = "q", "k_cache", "v_cache"
TREE = int32([[[1], [3]]] * 2)
WIDE = torch.zeros(2, 2, 4, 32)
Q = torch.zeros(2, 2, 4, 16)
CACHE = torch.zeros(2, 40, 2, 16)
LONGER = torch.zeros(2, 41, 2, 16)
NESTED = torch.nested.nested_tensor([torch.zeros(2)] * 2)

# Changes to a call with 2 requests of 2 tokens, 4 heads over 2, head dim 16, a cache of 40 rows.
REFUSED = [
    (TypeError, "q must be a tensor, got list", {"q": [1]}),
    (ValueError, "q must have 4 dimensions, got shape [2, 2, 64]", {"q": torch.zeros(2, 2, 64)}),
    (TypeError, "q must have dtype torch.float16, torch", {"q": Q.int()}),
    (ValueError, "q must have stride 1 in its last", {"q": WIDE[..., ::2]}),
    (ValueError, "heads of q must be a multiple of those of k_cache and", {"q": Q[:, :, 1:]}),
    (ValueError, "head dim of q must be a multiple of 8 from", {x: Q[..., :4] for x in OPERANDS}),
    (ValueError, "q must be on cpu or cuda, got meta", {"q": Q.to("meta")}),
    (TypeError, "k_cache must have q's dtype, torch.float32", {"k_cache": CACHE.half()}),
    (ValueError, "k_cache must have q's head dim, 16, got 8", {"k_cache": CACHE[..., :8]}),
    (ValueError, "v_cache must have k_cache's shape, [2, 41", {"k_cache": LONGER}),
    (ValueError, "v_cache must have 4 dimensions, got", {"v_cache": torch.zeros(2, 40, 32)}),
    (TypeError, "seq_lens must be a tensor, got int", {"seq_lens": 3}),
    (TypeError, "seq_lens must have dtype torch.int32", {"seq_lens": ONES.long()}),
    (ValueError, "seq_lens must have shape [2] or [2, 2], got [3]", {"seq_lens": int32([1, 1, 1])}),
    (ValueError, "page_table must have shape [2, any] or [2, 2", {"page_table": ONES}),
    (TypeError, "blocks must be (indices, counts, block), got", {"blocks": ONES}),
    (TypeError, "tokens must be (indices, counts or None)", {"tokens": (1, 2, 3)}),
    (ValueError, "blocks[2] must be 16, 32, 64 or 128, got 48", {"blocks": (*BLOCKS[:2], 48)}),
    (TypeError, "blocks[2] must be an int, got 16.0", {"blocks": (*BLOCKS[:2], 16.0)}),
    (ValueError, "blocks[1] must have shape [2, 2 or 1]", {"blocks": (BLOCKS[0], ONES, 16)}),
    (TypeError, "blocks[0] must be a tensor, got None", {"blocks": (None, BLOCKS[1], 16)}),
    (TypeError, "tokens[0] must be a tensor, got None", {"tokens": (None, ONES)}),
    (ValueError, "tokens[0] must have shape [2, 2 or 1, 2 or 1", {"tokens": (ONES, None)}),
    (ValueError, "head_starts must be given, got blocks and", {"blocks": BLOCKS, "tokens": TOKENS}),
    (ValueError, "must be given, got blocks and head_starts", {"blocks": BLOCKS, **SPANS}),
    (ValueError, "head_lengths must be given with", {"head_starts": SPANS["head_starts"]}),
    (ValueError, "head_lengths must have shape [2, 2], got", {**SPANS, "head_lengths": ONES}),
    (ValueError, "tree_mask must have shape [2, 2, 1]", {"tree_mask": TREE[..., 0]}),
    (ValueError, "without window, got causal=False", {"tree_mask": TREE, "causal": False}),
    (ValueError, "got causal=True and window=3", {"tree_mask": TREE, "window": 3}),
    (TypeError, "causal must be True or False, got 1", {"causal": 1}),
    (ValueError, "window must be at least 1, got 0", {"window": 0}),
    (TypeError, "window must be an int, got 2.5", {"window": 2.5}),
    (TypeError, "window must be an int, got True", {"window": True}),
    (TypeError, "window must be an int, got tensor", {"window": torch.tensor(3)}),
    (ValueError, "window must be less than 2^63, got", {"window": 1 << 63}),
    (TypeError, "scale must be a finite number or None, got True", {"scale": True}),
    (TypeError, "split_tokens must be an int, got tensor", {"split_tokens": torch.tensor(64)}),
    (TypeError, "blocks[2] must be an int, got tensor", {"blocks": (*BLOCKS[:2], ONES.sum() * 8)}),
    (TypeError, "k_cache must be a dense (strided) tensor", {"k_cache": CACHE.to_sparse()}),
    (TypeError, "seq_lens must be a dense (strided) tensor", {"seq_lens": ONES.to_sparse()}),
    (ValueError, "scale must be a finite number, got nan", {"scale": torch.nan}),
    (TypeError, "scale must be a finite number or None", {"scale": "a"}),
    (TypeError, "skip_threshold must be a dense (strided)", {"skip_threshold": NESTED}),
    (TypeError, "out must be a dense (strided) tensor", {"out": NESTED}),
    (ValueError, "sink must have shape [4], got [2]", {"sink": torch.zeros(2)}),
    (TypeError, "sink must have dtype torch.float32, got", {"sink": torch.zeros(4).double()}),
    (ValueError, "skip_threshold must be at least 0 and less", {"skip_threshold": 1.0}),
    (ValueError, "skip_threshold must have shape [2]", {"skip_threshold": torch.zeros(3)}),
    (ValueError, "split_tokens must be a multiple of 64, got", {"split_tokens": 100}),
    (ValueError, "split_tokens must be at least 64, got 0", {"split_tokens": 0}),
    (ValueError, "out must have q's shape, [2, 2, 4, 16], got", {"out": Q[..., :8]}),
    (TypeError, "out must have q's dtype, torch.float32", {"out": Q.double()}),
    (ValueError, "got stride 0 in dimension 1", {"out": Q[:, :1].expand_as(Q)}),
    (ValueError, "out must have stride 1 in its last", {"out": WIDE[..., ::2]}),
]  # fmt: skip


def call(**changes):
    plain = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "seq_lens": int32([40, 3])}
    return decode_attention(**{**plain, **changes})


@pytest.mark.parametrize(("kind", "message", "changes"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused(kind, message, changes):
    with pytest.raises(kind, match=re.escape(message)) as error:
        call(**changes)
    assert error.value.__cause__ is None


def test_the_plain_call_is_not_refused():
    assert call().eq(0).all()
    assert call(blocks=BLOCKS).eq(0).all()
    assert call(tokens=TOKENS, window=3).eq(0).all()
    assert call(**SPANS, split_tokens=64).eq(0).all()
    assert call(tree_mask=TREE, out=torch.full((2, 2, 4, 16), torch.nan)).eq(0).all()


def test_an_empty_out_may_have_any_strides():
    q = Q[:, :0]
    out = torch.empty_strided(q.shape, (0, 0, 0, 1))
    assert call(q=q, out=out) is out
    assert call(q=q, out=out, scale=1) is out  # which Python checks, as it is no float


def test_batches_differ_without_a_page_table():
    with pytest.raises(ValueError, match=r"^k_cache must have q's batch without .*, 2, got 3"):
        call(k_cache=torch.zeros(3, 40, 2, 16), v_cache=torch.zeros(3, 40, 2, 16))


def test_the_raw_op_names_the_argument():
    op = torch.ops.sparse_fmha.decode
    for message, changes in {
        "seq_lens must have shape [2], got [3]": {"seq_lens": int32([1, 1, 1])},
        "page_table must have shape [2, any], got [2]": {"page_table": ONES},
        "token_indices must be given with token_counts": {"token_counts": ONES},
        "block_counts must be given with block_indices": {"block_indices": BLOCKS[0]},
        "block must be 16, 32, 64 or 128, got 8": {
            "block_indices": BLOCKS[0], "block_counts": BLOCKS[1], "block": 8,
        },
        "split_tokens must be a multiple of 64": {"split_tokens": 65},
        "window must be at least 1 or None, got 0": {"window": 0},
    }.items():  # fmt: skip
        arguments = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "seq_lens": ONES, **changes}
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(**arguments)
