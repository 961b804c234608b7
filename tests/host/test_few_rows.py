"""Which decode calls take Hopper's kernel for few rows, and how many blocks share a group there."""

import itertools

import pytest

decode = pytest.importorskip("sparse_fmha._C").decode
CALL = {"batch": 16, "heads_kv": 8, "len_q": 1, "group": 4, "capacity": 8192}


def blocks(**changes):
    return decode.few_rows_blocks(**{**CALL, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"group": 17},
        {"len_q": 5},
        {"tokens": True, "width": 100},
        {"page": 8},
        {"page": 24},
        {"page": 64, "block": 8, "width": 9},
        {"page": 64, "spans": True},
        {"tree": True},
        {"split": 64},
        {"capacity": 40000},
        {"batch": 65536},
    ],
    ids=str,
)
def test_other_calls(changes):
    assert blocks(**changes) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"group": 16},
        {"len_q": 4},
        {"page": 16},
        {"page": 48},
        {"page": 64, "block": 16, "width": 9},
        {"block": 64, "width": 9, "len_q": 4},
        {"spans": True},
        {"capacity": 32768},
        {"batch": 1, "capacity": 131072},
        {"block": 64, "width": 100, "capacity": 1 << 20},
    ],
    ids=str,
)
def test_these_calls(changes):
    assert 1 <= blocks(**changes) <= 8


def test_blocks_keep_memory_busy_and_have_keys():
    """About 64 blocks, of 128 keys and more; no more than 16384 where a request may be longest."""
    for batch, heads, capacity in itertools.product(
        (1, 2, 3, 7, 8, 16, 64), (1, 2, 8, 32), (1, 100, 200, 1000, 16384, 16385, 32768)
    ):
        found = blocks(batch=batch, heads_kv=heads, capacity=capacity)
        fill = min(8, max(1, 64 // (batch * heads)))
        assert found == max(min(fill, -(-capacity // 128)), -(-capacity // 16384))
