"""Heads with different methods in one layer: each as if it were alone."""

import json

import pytest
import torch
from dispatch_watch import Watch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, patterns, reference
from sparse_fmha.patterns import WholeMethod, join_heads, per_head_attention

LENGTH = 200


def stripe(q, k):
    options = {"vertical": 12, "slash": 5, "last": 20, "first_columns": 4, "last_diagonals": 2}
    return patterns.vertical_slash(q, k, **options)


def columns(q, k):
    """A StripeMask without runs."""
    seen = torch.zeros(1, 1, 4, LENGTH, dtype=torch.bool)
    seen[..., ::3] = True
    return StripeMask.from_columns(seen, LENGTH, 64, causal=True)


def blocks(q, k):
    return patterns.minference_block_sparse(q, k, top_k=2)


WINDOW = patterns.streaming_llm(LENGTH, LENGTH, window=30, sink=3, block_q=64, block_kv=64)
DENSE = WholeMethod(lambda q, k, v: sparse_fmha.attention(q, k, v, causal=True))


@pytest.fixture(scope="module")
def tensors(randn):
    q = randn(2, LENGTH, 8, 16, dtype=torch.float64).requires_grad_()
    k, v = (randn(2, LENGTH, 2, 16, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2))
    return q, k, v


def alone(q, k, v, methods):
    """Attention head by head under its own mask, in fp64; and the masks."""
    visible = torch.zeros(2, 8, LENGTH, LENGTH, dtype=torch.bool)
    for heads, method in methods:
        for h in heads:
            if method is DENSE:
                visible[:, h] = reference.causal_mask(LENGTH, LENGTH)
                continue
            own = q[:, :, h : h + 1].detach(), k[:, :, h // 4 : h // 4 + 1].detach()
            mask = method if isinstance(method, BlockMask) else method(*own)
            visible[:, h] = mask.to_dense()[:, 0]
    return reference.attention(q, k, v, visible)


MIXES = {
    "stripes": [([0, 1, 2, 3], stripe), (range(4, 8), columns)],
    "blocks": [([7, 0, 2], blocks), ([1, 3, 4, 5, 6], WINDOW)],
    "all": [([6, 0], stripe), ([1, 5], blocks), ([2], WINDOW), ([3], columns), ([4, 7], DENSE)],
    "one": [(range(8), stripe)],
    "dense": [(range(4, 8), DENSE), (range(4), DENSE)],
}


@pytest.mark.parametrize("name", MIXES)
def test_each_head_is_as_if_alone(tensors, name):
    q, k, v = tensors
    out = per_head_attention(q, k, v, MIXES[name])
    expected, lse = alone(q, k, v, MIXES[name])
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), tensors)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    if name not in ("all", "dense"):
        _, found = per_head_attention(q, k, v, MIXES[name], return_lse=True)
        torch.testing.assert_close(found, lse.float())


@pytest.mark.parametrize(("name", "launches"), [("stripes", 1), ("blocks", 1), ("all", 2)])
def test_one_launch_for_each_kind(tensors, monkeypatch, name, launches):
    calls = []
    module = __import__("sparse_fmha.patterns.per_head", fromlist=["per_head"])
    for op in ("block_sparse_attention", "stripe_attention"):
        real = getattr(module, op)
        monkeypatch.setattr(
            module, op, lambda *args, real=real, **more: calls.append(1) or real(*args, **more)
        )
    per_head_attention(*tensors, MIXES[name])
    assert len(calls) == launches


def test_joined_masks(tensors):
    q, k, _ = (x.detach() for x in tensors)
    parts = [([2, 0], blocks(q[:, :, :2], k)), ([3], WINDOW)]
    mask = join_heads(parts, 5)
    mask.validate()
    dense = mask.to_dense()
    assert dense[:, [2, 0]].equal(parts[0][1].to_dense())
    assert dense[:, 3].equal(WINDOW.to_dense()[:, 0].expand(2, -1, -1))
    assert not dense[:, [1, 4]].any()


def test_without_the_host(tensors):
    q, k, v = (x.detach() for x in tensors)
    with Watch():
        per_head_attention(q, k, v, MIXES["blocks"])
        per_head_attention(q, k, v, [([3, 0, 5], stripe), ([1, 2, 4, 6, 7], blocks)])


def test_search(tensors):
    q, k, v = (x.detach() for x in tensors)
    candidates = {"stripe": stripe, "blocks": blocks, "window": WINDOW, "dense": DENSE}
    few = {name: candidates[name] for name in ("stripe", "blocks", "window")}
    dense, _ = alone(q, k, v, [(range(8), DENSE)])
    errors = []
    for method in few.values():
        out, _ = alone(q, k, v, [(range(8), method)])
        errors.append((out - dense).square().sum((0, 1, 3)) / dense.square().sum((0, 1, 3)))
    found = patterns.search_heads(q, k, v, few)
    torch.testing.assert_close(found.errors, torch.stack(errors).sqrt().float())
    best = torch.stack(errors).argmin(0).tolist()
    assert found.best == [list(few)[n] for n in best]
    methods = found.methods(few)
    assert sorted(head for heads, _ in methods for head in heads) == list(range(8))
    assert all(few[found.best[head]] is method for heads, method in methods for head in heads)
    assert set(patterns.search_heads(q, k, v, candidates).best) == {"dense"}


FILE = [
    {},
    {
        "0": ["vertical_and_slash", 20, 110, 0.5],
        "2": ["stream_llm", 3, 30, 1],
        "1": ["vertical_and_slash", 40, 105, 7],
        "7": ["vertical_and_slash", 20, 110, 9],
        "5": ["block_sparse", 10, 1, 9],
    },
]


def test_a_layer_of_a_file(tensors, tmp_path):
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(FILE))
    layers = patterns.load_minference(path)
    assert layers == patterns.load_minference(FILE)
    assert layers[1][1] == ("vertical_and_slash", 40, 105)
    q, k, v = (x.detach() for x in tensors)
    out = patterns.minference_attention(q, k, v, layers[1], top_k=2)

    def vertical_slash(columns, diagonals):
        return lambda q, k: patterns.vertical_slash(q, k, vertical=columns, slash=diagonals)

    methods = [
        ([0, 7], vertical_slash(20, 110)),
        ([1], vertical_slash(40, 105)),
        ([2], WINDOW),
        ([5], blocks),
        ([3, 4, 6], vertical_slash(1000, 6096)),
    ]
    torch.testing.assert_close(out, alone(q, k, v, methods)[0])
    whole = patterns.minference_attention(q, k, v, layers[0])
    torch.testing.assert_close(whole, alone(q, k, v, [(range(8), DENSE)])[0])


Q = torch.zeros(1, LENGTH, 2, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: per_head_attention(Q, Q, Q, [([0], stripe)]),
            ValueError,
            r"methods must name each head of 0 to 1 once, got \[0\]",
        ),
        (
            lambda: per_head_attention(Q, Q, Q, [([0, 1, 1], stripe)]),
            ValueError,
            r"methods must name each head of 0 to 1 once, got \[0, 1, 1\]",
        ),
        (
            lambda: per_head_attention(Q, Q, Q, [([0, 1], lambda q, k: q)]),
            TypeError,
            "masks must be BlockMasks or StripeMasks, got Tensor",
        ),
        (
            lambda: per_head_attention(
                Q, Q, Q, [([0, 1], WholeMethod(lambda q, k, v: q[:, :, :1]))]
            ),
            ValueError,
            r"a WholeMethod must return shape \[1, 200, 2, 16\], got \[1, 200, 1, 16\]",
        ),
        (
            lambda: per_head_attention(Q, Q, Q, [(range(2), DENSE)], return_lse=True),
            ValueError,
            "return_lse must be False with a WholeMethod, which returns none, got True",
        ),
        (
            lambda: per_head_attention(Q, Q, Q, [([0, "1"], stripe)]),
            TypeError,
            "a head must be an int, got '1'",
        ),
        (lambda: join_heads([], 2), ValueError, "parts must have at least one mask, got none"),
        (
            lambda: join_heads([([0], WINDOW), ([1], columns(Q, Q))], 2),
            ValueError,
            "masks must have one kind, lengths, block sizes and causal, got",
        ),
        (
            lambda: join_heads([([0, 1, 2], stripe(Q, Q))], 3),
            ValueError,
            r"the mask of heads \[0, 1, 2\] must have lists for 1 or 3 heads, got 2",
        ),
        (
            lambda: join_heads([([0, 0], WINDOW)], 2),
            ValueError,
            r"parts must name each head of 0 to 1 at most once, got \[0, 0\]",
        ),
        (
            lambda: join_heads([([2], WINDOW)], 2),
            ValueError,
            r"parts must name each head of 0 to 1 at most once, got \[2\]",
        ),
        (
            lambda: patterns.search_heads(Q, Q, Q, {}),
            ValueError,
            "candidates must have at least one method, got none",
        ),
        (
            lambda: patterns.load_minference([[]]),
            ValueError,
            r"source must have a list of objects, one for each layer, got \[\[\]\]",
        ),
        (
            lambda: patterns.load_minference([{"x": ["stream_llm", 1, 2]}]),
            ValueError,
            "heads of layer 0 must be numbers, got 'x'",
        ),
        (
            lambda: patterns.load_minference([{"3": ["dense", 1, 2]}]),
            ValueError,
            "the pattern of layer 0, head 3 must be one of ",
        ),
        (
            lambda: patterns.load_minference([{"3": ["stream_llm", 1.5, 2]}]),
            TypeError,
            r"a number of layer 0, head 3 must be an int, got 1\.5",
        ),
        (
            lambda: patterns.minference_heads({5: ("stream_llm", 1, 2)}, 2, 9, 9),
            ValueError,
            "patterns must have heads 0 to 1, got 5",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
