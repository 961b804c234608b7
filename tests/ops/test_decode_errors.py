"""What decode attention refuses: the message names the argument, its value and what is allowed."""

import re

import decode_cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_fmha import decode_attention

int32 = decode_cases.int32
ONES = torch.ones(2, dtype=torch.int32)
BLOCKS = int32([[[0]], [[0]]]), int32([[1], [1]]), 16
TOKENS = int32([[[[0]]], [[[0]]]]), None
SPANS = {"head_starts": int32([[0, 0]] * 2), "head_lengths": int32([[1, 1]] * 2)}
TREE = int32([[[1], [3]]] * 2)
WIDE = torch.zeros(2, 2, 4, 32)
Q = torch.zeros(2, 2, 4, 16)
CACHE = torch.zeros(2, 40, 2, 16)
LONGER = torch.zeros(2, 41, 2, 16)

# Changes to a call with 2 requests of 2 tokens, 4 heads over 2, head dim 16, a cache of 40 rows.
REFUSED = [
    (TypeError, "q must be a tensor, got list", {"q": [1]}),
    (ValueError, "q has shape [2, 2, 64]; 4 dim", {"q": torch.zeros(2, 2, 64)}),
    (TypeError, "q must have dtype torch.float16, torch.bfloat16", {"q": Q.int()}),
    (ValueError, "q must have stride 1 in its last dimension, got 2", {"q": WIDE[..., ::2]}),
    (ValueError, "q has 3 heads, the cache has 2", {"q": torch.zeros(2, 2, 3, 16)}),
    (ValueError, "q must be on cpu or cuda, got meta", {"q": Q.to("meta")}),
    (TypeError, "k_cache must have q's dtype, torch.float32, got", {"k_cache": CACHE.half()}),
    (ValueError, "k_cache has head dim 8, q has 16", {"k_cache": CACHE[..., :8]}),
    (ValueError, "k_cache has shape [2, 41, 2, 16], v_cache has [2", {"k_cache": LONGER}),
    (ValueError, "v_cache has shape [2, 40, 32]; 4 dim", {"v_cache": torch.zeros(2, 40, 32)}),
    (TypeError, "seq_lens is a int; a tensor is needed", {"seq_lens": 3}),
    (TypeError, "seq_lens has dtype torch.int64; torch.int32", {"seq_lens": ONES.long()}),
    (ValueError, "seq_lens has shape [3]; [2] or [2, 2] is needed", {"seq_lens": int32([1, 1, 1])}),
    (ValueError, "page_table has shape [2]; [2, any] or [2, 2, any]", {"page_table": ONES}),
    (TypeError, "blocks is a Tensor; (indices, counts, block) is", {"blocks": ONES}),
    (TypeError, "tokens is a tuple of 3; (indices, counts or None)", {"tokens": (1, 2, 3)}),
    (ValueError, "blocks[2] is 48; allowed are: 16, 32, 64, 128", {"blocks": (*BLOCKS[:2], 48)}),
    (TypeError, "blocks[2] is 16.0; an int is needed", {"blocks": (*BLOCKS[:2], 16.0)}),
    (ValueError, "blocks[1] has shape [2]; [2, 2 or 1] is", {"blocks": (BLOCKS[0], ONES, 16)}),
    (TypeError, "blocks[0] is None; a tensor is", {"blocks": (None, BLOCKS[1], 16)}),
    (TypeError, "tokens[0] is None; a tensor is", {"tokens": (None, ONES)}),
    (ValueError, "tokens[0] has shape [2]; [2, 2 or 1, 2 or 1, any]", {"tokens": (ONES, None)}),
    (ValueError, "blocks and tokens are given; at most", {"blocks": BLOCKS, "tokens": TOKENS}),
    (ValueError, "blocks and head_starts are given", {"blocks": BLOCKS, **SPANS}),
    (ValueError, "head_starts is given without", {"head_starts": SPANS["head_starts"]}),
    (ValueError, "head_lengths has shape [2]; [2, 2] is", {**SPANS, "head_lengths": ONES}),
    (ValueError, "tree_mask has shape [2, 2]; [2, 2, 1]", {"tree_mask": TREE[..., 0]}),
    (ValueError, "tree_mask is given with causal=False", {"tree_mask": TREE, "causal": False}),
    (ValueError, "causal=True and window=3; True and None", {"tree_mask": TREE, "window": 3}),
    (TypeError, "causal must be True or False, got 1", {"causal": 1}),
    (ValueError, "window must be at least 1, got 0", {"window": 0}),
    (TypeError, "window must be an int, got 2.5", {"window": 2.5}),
    (ValueError, "scale must be a finite number, got nan", {"scale": torch.nan}),
    (TypeError, "scale must be a finite number or None, got 'a'", {"scale": "a"}),
    (ValueError, "sink has shape [2]; [4] is needed", {"sink": torch.zeros(2)}),
    (TypeError, "sink has dtype torch.float64; torch.float32", {"sink": torch.zeros(4).double()}),
    (ValueError, "skip_threshold must be at least 0 and less", {"skip_threshold": 1.0}),
    (ValueError, "skip_threshold must have shape [2], one", {"skip_threshold": torch.zeros(3)}),
    (ValueError, "split_tokens is 100; a multiple of 64", {"split_tokens": 100}),
    (ValueError, "split_tokens must be at least 64, got 0", {"split_tokens": 0}),
    (ValueError, "out has shape [2, 2, 4, 8], q has [2, 2, 4, 16]", {"out": Q[..., :8]}),
    (TypeError, "out must have q's dtype, torch.float32, got torch.float64", {"out": Q.double()}),
    (ValueError, "out has stride 0 in dimension 1", {"out": Q[:, :1].expand_as(Q)}),
    (ValueError, "out must have stride 1 in its last dimension, got 2", {"out": WIDE[..., ::2]}),
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


def test_batches_differ_without_a_page_table():
    with pytest.raises(ValueError, match=r"^k_cache has batch 3, q has 2; .* no page_table"):
        call(k_cache=torch.zeros(3, 40, 2, 16), v_cache=torch.zeros(3, 40, 2, 16))


def test_the_raw_op_names_the_argument():
    op = torch.ops.sparse_fmha.decode
    for message, changes in {
        "seq_lens has shape [3]; [2] is needed": {"seq_lens": int32([1, 1, 1])},
        "page_table has shape [2]; [2, any]": {"page_table": ONES},
        "token_counts is given without token_indices": {"token_counts": ONES},
        "block_indices is given without block_counts": {"block_indices": BLOCKS[0]},
        "block is 8; 16, 32, 64 or 128 is needed": {
            "block_indices": BLOCKS[0], "block_counts": BLOCKS[1], "block": 8,
        },
        "split_tokens is 65; a multiple of 64": {"split_tokens": 65},
        "window is 0; at least 1, or None": {"window": 0},
    }.items():  # fmt: skip
        arguments = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "seq_lens": ONES, **changes}
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(**arguments)


def test_cuda_tensors_are_not_for_it_yet():
    with FakeTensorMode():
        q, cache = (torch.empty(2, n, 2, 16, device="cuda") for n in (2, 40))
        lengths = torch.empty(2, dtype=torch.int32, device="cuda")
        message = "sparse_fmha::decode: q is on cuda:0; decode kernels run on the CPU only so far"
        with pytest.raises(NotImplementedError, match=message):
            decode_attention(q, cache, cache, lengths)
