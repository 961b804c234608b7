"""Which decode calls take Hopper's kernel for few rows, and how many blocks share a group there."""

import itertools

import pytest

decode = pytest.importorskip("sparse_fmha._C").decode
CALL = {"batch": 16, "heads_kv": 8, "len_q": 1, "group": 4, "capacity": 8192}


def call(**changes):
    return decode.few_rows(**{**CALL, **changes})


def blocks(**changes):
    return call(**changes)[1]


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
        {"batch": 17, "capacity": 40000},
        {"batch": 65536},
    ],
    ids=str,
)
def test_other_calls(changes):
    assert call(**changes) == ("never", 0)


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
    use, count = call(**changes)
    assert use == "always"
    assert 1 <= count <= 8


@pytest.mark.parametrize(
    ("changes", "use", "count"),
    [
        ({}, "by lengths", 1),
        ({"batch": 4}, "by lengths", 2),
        ({"batch": 2}, "by lengths", 4),
        ({"batch": 5}, "by lengths", 2),
        ({"batch": 3, "heads_kv": 3}, "by lengths", 8),
        ({"batch": 4, "page": 64}, "by lengths", 2),
        ({"batch": 4, "block": 64, "width": 4096, "capacity": 1 << 20}, "by lengths", 2),
        ({"batch": 1, "capacity": 1 << 20}, "always", 8),
        ({"batch": 1, "heads_kv": 32}, "always", 2),
        ({"batch": 1, "heads_kv": 32, "by_head": True}, "by lengths", 2),
        ({"batch": 1, "heads_kv": 32, "spans": True}, "by lengths", 2),
        # Memory is not kept busy, or not all groups run at a time.
        ({"batch": 1, "heads_kv": 7, "capacity": 1 << 20}, "never", 0),
        ({"batch": 17}, "never", 0),
        ({"batch": 64}, "never", 0),
        ({"multiprocessors": 114}, "never", 0),
        ({"split": 4096}, "never", 0),
        ({"group": 17}, "never", 0),
    ],
    ids=str,
)
def test_long_caches(changes, use, count):
    assert call(**{"capacity": 131072, **changes}) == (use, count)


def test_all_groups_of_a_long_call_run_at_a_time():
    for batch, heads, capacity in itertools.product(
        range(1, 140), (1, 2, 3, 8, 32), (32769, 131072, 131073, 1 << 24)
    ):
        use, count = call(batch=batch, heads_kv=heads, capacity=capacity)
        short = -(-capacity // 16384) <= max(min(8, max(1, 64 // (batch * heads))), 2)
        if not short and use != "never":
            assert 64 <= batch * heads * count <= 132
            assert (use == "always") == (batch == 1)


def took(slots, blocks, busy, alone):
    """The model of the lab note, in ns: the kernel for few rows, and the one with a plan.

    `busy`: of a key while all groups are read, `alone`: of a key of a block whose neighbors have
    ended. Groups of a wave begin together, and memory is busy until the mean is read.
    """
    mean = sum(slots) / len(slots)
    return mean * busy + (max(slots) - mean) * alone / blocks


@pytest.mark.parametrize(
    ("requests", "blocks", "few", "plan"),
    [(4, 2, 485.2, 515.5), (16, 1, 1888.6, 1945.1)],
)
def test_lengths_that_are_alike(requests, blocks, few, plan):
    """Measured times of 128k tokens, in us: what is taken as alike is no slower, by the model."""
    tokens = 131072
    assert decode.alike([tokens] * requests, blocks)
    busy = 1e3 * few / tokens
    for more in range(0, tokens, tokens // 256):
        slots = [tokens + more] + [tokens] * (requests - 1)
        if decode.alike(slots, blocks):
            with_plan = plan / tokens * sum(slots) / requests
            assert took(slots, blocks, busy, 8.1) / 1e3 <= with_plan
    assert not decode.alike([tokens + tokens // 8] + [tokens] * (requests - 1), blocks)


@pytest.mark.parametrize(
    ("slots", "count", "alike"),
    [
        ([], 1, True),
        ([0] * 4, 2, True),
        ([131072], 1, True),
        ([131072] + [2048] * 63, 1, False),
        ([131072] + [2048] * 15, 1, False),
        ([131072, 0, 0, 0], 2, False),
        ([1024] * 8 + [2048] * 8, 1, True),  # 512 keys above the mean
        ([1024] * 8 + [3072] * 8, 1, True),
        ([1024] * 8 + [3073] * 8, 1, False),
        ([1024] * 8 + [5120] * 8, 2, True),  # a block has 1024 of them
        ([1024] * 8 + [5121] * 8, 2, False),
        ([33 * 4096] * 16 + [32 * 4096] * 16, 1, True),
        ([2**31 - 1] * 256, 1, True),
        ([2**31 - 1] * 255 + [1], 1, True),
    ],
)
def test_the_rule(slots, count, alike):
    assert decode.alike(slots, count) == alike


def test_blocks_keep_memory_busy_and_have_keys():
    """About 64 blocks, of 128 keys and more; no more than 16384 where a request may be longest."""
    for batch, heads, capacity in itertools.product(
        (1, 2, 3, 7, 8, 16, 64), (1, 2, 8, 32), (1, 100, 200, 1000, 16384, 16385, 32768)
    ):
        found = blocks(batch=batch, heads_kv=heads, capacity=capacity)
        fill = min(8, max(1, 64 // (batch * heads)))
        assert found == max(min(fill, -(-capacity // 128)), -(-capacity // 16384))
