"""Bad input to varlen_attention and its op: what is raised and what it says."""

import re

import pytest
import torch
from packed_cases import NAN, Packed, in_pages

from sparse_fmha import varlen_attention

OPS = torch.ops.sparse_fmha
CASE = Packed(lengths=((6, 8, 8), (3, 4, 4)))


def given(**changes):
    arguments, _ = CASE.arguments()
    return {**arguments, **changes}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# What differs from good arguments, the error of the function, and the start of what it and the raw
# op say.
BOTH = {
    "k of a batch": (
        {"k": torch.ones(1, 12, 2, 16)},
        ValueError,
        "k must have shape [tokens, heads, head dim], got [1, 12, 2, 16]",
    ),
    "v differs": (
        {"v": torch.ones(11, 2, 16)},
        ValueError,
        "v must have k's shape, [12, 2, 16], got [11, 2, 16]",
    ),
    "heads": (
        {"k": torch.ones(12, 3, 16), "v": torch.ones(12, 3, 16)},
        ValueError,
        "heads of q must be a multiple of those of k and v, got 4 and 3",
    ),
    "head dim": (
        {"k": torch.ones(12, 2, 8), "v": torch.ones(12, 2, 8)},
        ValueError,
        "k must have q's head dim, 16, got 8",
    ),
    "starts": ({"cu_q": ints()}, ValueError, "cu_q must have shape [sequences + 1], got [0]"),
    "dtype of starts": (
        {"cu_q": torch.tensor([0, 9])},
        TypeError,
        "cu_q must have dtype torch.int32, got torch.int64",
    ),
    "starts of keys": (
        {"cu_k": ints(0, 12)},
        ValueError,
        "cu_k must have shape [3], got [2]",
    ),
    "no starts of keys": (
        {"cu_k": None},
        ValueError,
        "cu_k must be given unless seqused_k and page_table are, got None",
    ),
    "keys in use": ({"seqused_k": ints(1)}, ValueError, "seqused_k must have shape [2], got [1]"),
    "bound of queries": ({"max_q": -1}, ValueError, "max_q must be at least 0, got -1"),
    "bound of keys": ({"max_k": -1}, ValueError, "max_k must be at least 0, got -1"),
    "scale": ({"scale": NAN}, ValueError, "scale must be a finite number, got nan"),
    "table": (
        {
            "page_table": ints(0, 1),
            "k": torch.ones(2, 8, 2, 16),
            "v": torch.ones(2, 8, 2, 16),
        },
        ValueError,
        "page_table must have shape [2, any], got [2]",
    ),
    "thresholds": (
        {"skip_threshold": torch.zeros(3)},
        ValueError,
        "skip_threshold must have shape [2], one entry for each batch entry, got [3]",
    ),
    "pages": (
        {"page_table": ints(0, 1)[:, None]},
        ValueError,
        "k must have shape [pages, page, heads, head dim], got [12, 2, 16]",
    ),
}
# What the op says in other words.
OF_THE_OP = {
    "k of a batch": "k must have 3 dimensions, got shape [1, 12, 2, 16]",
    "dtype of starts": "cu_q must have dtype Int, got Long",
    "thresholds": "skip_threshold must have shape [2], got [3]",
    "pages": "k must have 4 dimensions, got shape [12, 2, 16]",
}
# What only the function takes, or what the op's schema says itself.
FUNCTION = {
    "q of a batch": (
        {"q": torch.ones(1, 9, 4, 16)},
        ValueError,
        "q must have shape [tokens, heads, head dim], got [1, 9, 4, 16]",
    ),
    "starts in a list": ({"cu_q": [0, 9]}, TypeError, "cu_q must be a tensor, got list"),
    "causal": ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    "float bound": ({"max_q": 6.0}, TypeError, "max_q must be an int, got 6.0"),
    "threshold": (
        {"skip_threshold": 1.0},
        ValueError,
        "skip_threshold must be at least 0 and less than 1, got 1.0",
    ),
    "heads of sink": (
        {"sink": torch.zeros(3)},
        ValueError,
        "sink must have shape [4], one entry for each query head, got [3]",
    ),
    "dtype of sink": (
        {"sink": torch.zeros(4, dtype=torch.float64)},
        TypeError,
        "sink must have dtype torch.float32, got torch.float64",
    ),
    "shape of out": (
        {"out": torch.zeros(9, 4, 8)},
        ValueError,
        "out must have shape [9, 4, 16] on cpu, got [9, 4, 8] on cpu",
    ),
    "dtype of out": (
        {"out": torch.zeros(9, 4, 16, dtype=torch.float64)},
        TypeError,
        "out must have the result's dtype, torch.float32, got torch.float64",
    ),
    "a nested out": (
        {"out": torch.nested.nested_tensor([torch.zeros(4, 16)] * 9)},
        TypeError,
        "out must be a dense (strided) tensor, got a nested tensor",
    ),
    "nested thresholds": (
        {"skip_threshold": torch.nested.nested_tensor([torch.zeros(1)] * 2)},
        TypeError,
        "skip_threshold must be a dense (strided) tensor, got a nested tensor",
    ),
    "an expanded out": (
        {"out": torch.zeros(1, 4, 16).expand(9, 4, 16)},
        ValueError,
        "out must have each element once, got stride 0 in dimension 0",
    ),
    "out with a gradient": (
        {"out": torch.zeros(9, 4, 16), "sink": torch.zeros(4, requires_grad=True)},
        ValueError,
        "out must be None where a gradient is wanted, got a tensor",
    ),
}


@pytest.mark.parametrize("case", BOTH | FUNCTION)
def test_function(case):
    changes, error, message = (BOTH | FUNCTION)[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        varlen_attention(**given(**changes))


@pytest.mark.parametrize("case", BOTH)
def test_op(case):
    changes, _, message = BOTH[case]
    message = OF_THE_OP.get(case, message)
    with pytest.raises(RuntimeError, match="sparse_fmha: " + re.escape(message)):
        OPS.varlen_fwd(**given(**changes))


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"max_q": 5}, "max_q must be at least the 6 queries of sequence 0, got 5"),
        ({"max_k": 7}, "max_k must be at least the 8 keys of sequence 0, got 7"),
        ({"max_k": 7, "seqused_k": ints(3, 9)}, None),
    ],
)
def test_bounds(bound, message):
    if message is None:
        varlen_attention(**given(**bound))
        return
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        varlen_attention(**given(**bound))


def test_pages_have_no_gradient():
    paged = in_pages(given(), 4)
    paged["q"].requires_grad_()
    out = varlen_attention(**paged)
    with pytest.raises(NotImplementedError, match="varlen_fwd has no backward pass for keys in"):
        out.sum().backward()
    q, dout = paged.pop("q").detach(), out.detach()
    lse = torch.zeros(9, 4)
    with pytest.raises(
        RuntimeError, match="page_table must be None, because keys in pages have no"
    ):
        OPS.varlen_bwd(dout, None, q, out=dout, lse=lse, **paged)
