"""MMInference's boundary heads against their definition, token by token."""

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import block_sparse_attention, patterns
from sparse_fmha.patterns import ModalityOrder, mminference_boundary

FRAMES = torch.cat([torch.full((n,), m) for n, m in [(30, 0), (100, 1), (13, 0), (90, 2), (60, 0)]])
MIXED = torch.randint(0, 3, (293,), generator=torch.Generator().manual_seed(0))


def blocks_of(modality, size):
    """Token positions of each block of the new order, with its modality."""
    made = []
    for m in range(int(modality.max()) + 1):
        own = (modality == m).nonzero()[:, 0]
        made += [(m, part) for part in own.split(size) if len(part)]
    return made


def definition(q, k, modality, keys_too, sizes, pairs, other):
    """Bool [B, Hq, L, L] in the original order."""
    batch, length, heads, _ = q.shape
    of_keys = modality if keys_too else torch.zeros_like(modality)
    columns = blocks_of(of_keys, sizes[1])
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, :, h * k.shape[2] // heads].double()
            for a, rows in blocks_of(modality, sizes[0]):
                mean = q[b, rows, h].double().mean(0)
                for m in range(int(of_keys.max()) + 1):
                    own = [part for n, part in columns if n == m and part[0] <= rows[-1]]
                    pattern = pairs.get((a, m), other)
                    if pattern == "none":
                        own = []
                    elif pattern[0] == "top_k":
                        own = sorted(own, key=lambda part: -float(mean @ keys[part].mean(0)))
                        own = own[: pattern[1]]
                    elif pattern[0] == "a_shape":
                        first, last = pattern[1:]
                        own = own[:first] + own[max(first, len(own) - last) :]
                    for part in own:
                        seen[b, h, rows[:, None], part] = part <= rows[:, None]
    return seen


@pytest.mark.parametrize("modality", [FRAMES, MIXED], ids=["frames", "mixed"])
@pytest.mark.parametrize(
    ("keys_too", "sizes", "pairs", "other"),
    [
        (True, (64, 64), {}, "dense"),
        (True, (64, 16), {(0, 0): "dense", (1, 1): ("top_k", 2), (2, 1): "none"}, ("top_k", 1)),
        (True, (128, 32), {(1, 0): ("a_shape", 1, 1), (0, 2): ("a_shape", 0, 2)}, "dense"),
        (False, (64, 16), {(0, 0): "dense", (1, 0): ("top_k", 3)}, ("a_shape", 2, 3)),
    ],
)
def test_the_definition(randn, agrees, modality, keys_too, sizes, pairs, other):
    q, k, v = (randn(2, 293, heads, 16, seed=s) for s, heads in enumerate((4, 2, 2)))
    order = ModalityOrder(modality, keys_too=keys_too, block_q=sizes[0], block_kv=sizes[1])
    mask = mminference_boundary(q, k, order, pairs, other=other)
    mask.validate()
    visible = definition(q, k, modality, keys_too, sizes, pairs, other)
    out, lse = block_sparse_attention(*order.permute(q, k, v), mask, return_lse=True)
    agrees(order.undo(out), order.undo(lse), q, k, v, visible)


def test_without_the_host(randn):
    q, k = randn(1, 293, 4, 16), randn(1, 293, 2, 16)
    order = ModalityOrder(MIXED)
    with Watch():
        mask = mminference_boundary(q, k, order, {(0, 0): ("top_k", 2)})
        block_sparse_attention(*order.permute(q, k, k), mask)


ORDER = ModalityOrder(torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0]))
Q = torch.zeros(1, 9, 2, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ModalityOrder(torch.zeros(4)),
            TypeError,
            r"region must be a tensor of integers, got torch\.float32",
        ),
        (
            lambda: ModalityOrder(torch.tensor([0]), block_q=32),
            ValueError,
            "block_q must be 64 or 128, got 32",
        ),
        (
            lambda: ModalityOrder(torch.tensor([0]), keys_too=1),
            TypeError,
            "keys_too must be True or False, got 1",
        ),
        (
            lambda: mminference_boundary(Q, Q[:, :5], ORDER, {}),
            ValueError,
            "k must have the 9 tokens of order, got 5",
        ),
        (
            lambda: mminference_boundary(Q, Q, ORDER, {(2, 0): "dense"}),
            ValueError,
            "pairs must have modalities of queries below 2 and of keys below 2, got",
        ),
        (
            lambda: mminference_boundary(Q, Q, ORDER, {(0, 0): "all"}),
            ValueError,
            r"last blocks\), got 'all'",
        ),
        (
            lambda: mminference_boundary(Q, Q, ORDER, {}, other=("top_k",)),
            ValueError,
            r"last blocks\), got \('top_k',\)",
        ),
        (
            lambda: mminference_boundary(Q, Q, ORDER, {}, other=("top_k", -1)),
            ValueError,
            r"a number of \('top_k', -1\) must be at least 0, got -1",
        ),
        (
            lambda: patterns.ModalityOrder(torch.tensor([[0]])),
            ValueError,
            r"region must have shape \[tokens\], got \[1, 1\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
