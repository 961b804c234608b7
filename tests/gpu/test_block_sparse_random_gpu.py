"""block_sparse_attention on the GPU: drawn configurations, all options mixed.

Other ones in every run. What fails prints its configuration and SPARSE_FMHA_SEED; with that in the
environment the same are drawn again.
"""

import os
import random

import pytest
from block_lists import BLOCKS, DTYPES, FULL, NONE, PARTIAL, Case, checker
from neighborhoods import (
    contiguous,
    crop,
    every_other_head,
    heads_first,
    laid_out,
    unaligned,
    wide_head_dim,
)

pytestmark = pytest.mark.gpu

SEED = os.environ.get("SPARSE_FMHA_SEED") or str(random.randrange(10**9))
NUMBER = 300
LAYOUTS = (contiguous, contiguous, heads_first, every_other_head, wide_head_dim, crop, unaligned)


@pytest.fixture(scope="session")
def check(make_qkv, agrees):
    return checker(make_qkv, agrees)


def drawn_case(rng):
    heads_kv = rng.randint(1, 3)
    full = rng.choice((0, 0.05, 0.3, 0.8, 1))
    return Case(
        len_q=int(2 ** rng.uniform(0, 10)),
        len_kv=int(2 ** rng.uniform(0, 11)),
        blocks=rng.choice(BLOCKS),
        full=full,
        partial=rng.choice((0, 0, 0.1, 0.5, 1)) * (1 - full),
        causal=rng.random() < 0.5,
        batch=rng.randint(1, 3),
        heads=heads_kv * rng.randint(1, 3),
        heads_kv=heads_kv,
        shared_batch=rng.random() < 0.3,
        shared_heads=rng.random() < 0.3,
        dim=8 * rng.randint(1, 32),
        dtype=rng.choice(DTYPES),
        scale=rng.choice((None, None, rng.uniform(-1, 1))),
    )


def drawn_kinds(case, rng, seed):
    """At random, with some rows of blocks that differ from the others."""
    kinds = case.kinds(seed)
    rows = range(kinds.shape[2])
    for row in rng.sample(rows, rng.randint(0, min(3, len(rows)))):
        kinds[:, rng.randrange(kinds.shape[1]), row] = rng.choice((NONE, FULL, PARTIAL))
    return kinds


@pytest.mark.parametrize("number", range(NUMBER))
def test_drawn(make_qkv, check, number):
    rng = random.Random(f"{SEED} {number}")
    case, layout = drawn_case(rng), rng.choice(LAYOUTS)
    print(f"SPARSE_FMHA_SEED={SEED}, {layout.__name__}: {case}")  # shown where the test fails
    lists = case.lists(drawn_kinds(case, rng, number), number)
    check(lists, laid_out(layout, make_qkv(*case.sizes(), seed=number)))
