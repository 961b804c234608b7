"""block_sparse_attention on the GPU: its numbers, over blocks, lists, dtypes, heads and scales."""

import itertools

import pairwise
import pytest
import torch
from block_lists import (
    BLOCKS,
    DTYPES,
    FULL,
    NONE,
    PARTIAL,
    ROWS,
    Case,
    attend,
    checker,
    close,
    same,
)

import sparse_fmha

pytestmark = pytest.mark.gpu

HEAD_DIMS = (8, 40, 64, 96, 128, 192, 256)
CASES = [
    Case(512, 512),
    Case(512, 512, full=0, partial=0.5),
    Case(512, 512, causal=True),
    Case(700, 333, full=0.3, partial=0.3),
    Case(333, 700, full=0.3, partial=0.3, causal=True),
    Case(700, 333, full=0.3, partial=0.3, causal=True),  # rows that see nothing
    Case(129, 1001, full=0.2, partial=0.1),
    Case(577, 577, full=0.7, partial=0.3, causal=True),  # whole rows, and an odd number of them
    Case(1, 700),
    Case(130, 3, full=0.5, partial=0.5),
]


@pytest.fixture(scope="session")
def check(make_qkv, agrees):
    return checker(make_qkv, agrees)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_configurations(check, case, blocks):
    lists = case.with_(blocks=blocks, batch=2).lists()
    visible = lists.visible()
    for dim, dtype in ROWS:
        check(lists.of(dim=dim, dtype=dtype), visible=visible)


@pytest.mark.parametrize("blocks", [(64, 16), (64, 64), (128, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(check, causal, blocks):
    lists = Case(300, 411, blocks, 0.4, 0.2, causal, batch=2).lists()
    visible = lists.visible()
    for dim, dtype in itertools.product(HEAD_DIMS, DTYPES):
        check(lists.of(dim=dim, dtype=dtype), visible=visible)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_visible_key_counts_once(make_qkv, case, blocks):
    """Scores of 0 and values of one-hot rows: the outputs are counts of keys, to be hit exactly."""
    drawn = case.with_(blocks=blocks).lists(seed=3)
    seen = drawn.visible().expand(1, case.heads, -1, -1)[0]
    for dim, dtype in ROWS:
        lists = drawn.of(dim=dim, dtype=dtype)
        q, k, v = make_qkv(*lists.case.sizes())
        eye = torch.eye(dim, device=q.device, dtype=dtype)
        v = eye[torch.arange(case.len_kv) % dim].view(v.shape)
        out, lse = attend(lists, torch.zeros_like(q), k, v)
        visible = seen.to(q.device)
        count = visible.sum(-1).T.double()  # [len_q, heads]
        torch.testing.assert_close(lse[0].double().exp(), count, rtol=1e-5, atol=0)
        counts = (out[0].double() * count[..., None]).round()
        assert counts.equal((visible.double() @ v[0, :, 0].double()).transpose(0, 1))


def _only(kinds, rows):
    """Nothing in the rows that a slice does not name."""
    kept = torch.zeros_like(kinds)
    kept[..., rows, :] = kinds[..., rows, :]
    return kept


def _halves(kinds):
    """Rows of a pair have no key in common."""
    half = -(-kinds.shape[-1] // 2)
    kinds = torch.full_like(kinds, FULL)
    kinds[..., ::2, half:] = NONE
    kinds[..., 1::2, :half] = NONE
    return kinds


def _one(kinds, rows=slice(None)):
    """One block in each row."""
    chosen = torch.zeros_like(kinds)
    columns = torch.arange(kinds.shape[-2]) * 7 % kinds.shape[-1]
    chosen[..., torch.arange(kinds.shape[-2])[rows], columns[rows]] = FULL
    return chosen


def _diagonal_of_pairs(kinds):
    """The rows of a pair list alternate blocks: their union is all of them."""
    odd = (torch.arange(kinds.shape[-2])[:, None] + torch.arange(kinds.shape[-1])) % 2
    return torch.where(odd.bool(), FULL, PARTIAL).expand_as(kinds).clone()


def _ends(kinds):
    """Only the last block of keys."""
    last = torch.zeros_like(kinds)
    last[..., -1] = kinds[..., -1].clamp(min=FULL)
    return last


PATTERNS = {
    "first of a pair": lambda kinds: _only(kinds, slice(0, None, 2)),
    "second of a pair": lambda kinds: _only(kinds, slice(1, None, 2)),
    "every third row": lambda kinds: _only(kinds, slice(1, None, 3)),
    "last row": lambda kinds: _only(kinds, slice(-1, None)),
    "same rows": lambda kinds: kinds[..., :1, :].expand_as(kinds),
    "rows with nothing in common": _halves,
    "one entry in each row": _one,
    "one entry": lambda kinds: _one(kinds, slice(-1, None)),
    "one of a pair full, one with an entry": lambda kinds: torch.where(
        (torch.arange(kinds.shape[-2]) % 2 == 0)[:, None], FULL, _one(kinds)
    ),
    "alternate": _diagonal_of_pairs,
    "last keys": _ends,
    "all full": lambda kinds: torch.full_like(kinds, FULL),
    "all partial": lambda kinds: torch.full_like(kinds, PARTIAL),
    "full rows and partial rows": lambda kinds: torch.where(
        (torch.arange(kinds.shape[-2]) % 2 == 0)[:, None], FULL, PARTIAL
    ).expand_as(kinds),
}


@pairwise.parametrize(pattern=PATTERNS, blocks=BLOCKS, causal=(False, True))
def test_patterns(check, pattern, blocks, causal):
    case = Case(450, 420, blocks, 0.3, 0.3, causal)  # 64-row blocks: eight, one ragged
    lists = case.lists(PATTERNS[pattern](case.kinds()))
    visible = lists.visible()
    for dim in (64, 128, 256):
        check(lists.of(dim=dim), visible=visible)


@pytest.mark.parametrize("len_q", [1, 64, 65, 128, 129, 192, 193, 320, 321])
@pytest.mark.parametrize("partial", [0, 0.3])
@pytest.mark.parametrize("block_kv", [16, 64, 128])
def test_odd_numbers_of_query_blocks(check, block_kv, partial, len_q):
    lists = Case(len_q, 300, (64, block_kv), 0.3, partial, batch=2).lists()
    visible = lists.visible()
    for dim in (64, 128, 256):
        check(lists.of(dim=dim), visible=visible)


@pytest.mark.parametrize("len_kv", [1, 15, 16, 17, 63, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [(64, 16), (64, 128), (128, 32), (128, 64)], ids=str)
def test_ragged_ends_of_keys(check, blocks, causal, len_kv):
    case = Case(200, len_kv, blocks, 0.5, 0.3, causal)
    kinds = case.kinds()
    kinds[..., -1].clamp_(min=FULL)  # the ragged block is always listed
    lists = case.lists(kinds)
    visible = lists.visible()
    for dim in (64, 128, 256):
        check(lists.of(dim=dim), visible=visible)


@pytest.mark.parametrize("lengths", [(513, 513), (300, 700), (700, 300)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [FULL, PARTIAL], ids=["full", "partial"])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_all_blocks_are_dense_attention(make_qkv, blocks, kind, causal, lengths):
    case = Case(*lengths, blocks, causal=causal, heads=4, heads_kv=2, shared_heads=True)
    drawn = case.lists(torch.full(case.grid, kind))
    if kind == PARTIAL:
        drawn = drawn.with_(partial_bits=torch.full_like(drawn.partial_bits, 255))
    for dim in (64, 128, 256):
        lists = drawn.of(dim=dim)
        given = make_qkv(*lists.case.sizes())
        dense, dense_lse = sparse_fmha.attention(*given, causal=causal, return_lse=True)
        out, lse = attend(lists, *given)
        close(out, dense)
        torch.testing.assert_close(lse, dense_lse, rtol=2e-6, atol=1e-3)


def _lopsided(kinds):
    """Of three neighboring rows one lists all blocks, one a few far ones, one the last block."""
    row = torch.arange(kinds.shape[-2])[:, None] % 3
    column = torch.arange(kinds.shape[-1])
    few = (column % 23 == 11).expand(kinds.shape[-2:])
    last = (column == kinds.shape[-1] - 1).expand_as(few)
    listed = torch.where(row == 0, True, torch.where(row == 1, few, last))
    return listed.long().mul(FULL).expand_as(kinds).clone()


@pytest.mark.parametrize("kinds", [lambda kinds: kinds, _lopsided], ids=["random", "lopsided"])
@pytest.mark.parametrize("block_kv", [64, 128])
def test_more_query_tiles_than_multiprocessors(check, block_kv, kinds):
    """Thread blocks take several query tiles, and go around their ring many times."""
    case = Case(4168, 4030, (64, block_kv), 0.3, heads=8, heads_kv=4, dim=128)
    check(case.lists(kinds(case.kinds())))


@pytest.mark.parametrize("heads", [(6, 2), (6, 1), (6, 6), (34, 17)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", [(64, 32), (128, 128)], ids=str)
def test_grouped_heads(check, blocks, dim, heads):
    """Every query head has lists of its own."""
    for causal in (False, True):
        case = Case(300, 333, blocks, 0.3, 0.2, causal, 2, *heads, dim=dim)
        check(case.lists())


@pytest.mark.parametrize("shared", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("partial", [0, 0.3])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_shared_lists(make_qkv, check, blocks, partial, shared):
    shared_batch, shared_heads = shared
    case = Case(300, 411, blocks, 0.3, partial, batch=3, heads=6, heads_kv=3, dim=128)
    lists = case.with_(shared_batch=shared_batch, shared_heads=shared_heads).lists()
    given = make_qkv(*case.sizes())
    results = check(lists, given)
    rows = 1 if shared_batch else 3, 1 if shared_heads else 6
    repeats = 3 // rows[0], 6 // rows[1]
    own = [
        None if x is None else x.repeat(*repeats, *[1] * (x.dim() - 2))
        for x in lists.tensors("cpu")
    ]
    assert same(attend(type(lists)(case, *own), *given), results)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [(64, 16), (64, 128), (128, 64)], ids=str)
def test_scale(check, blocks, causal):
    lists = Case(257, 300, blocks, 0.4, 0.2, causal, 2).lists()
    visible = lists.visible()
    for dim, scale in itertools.product((64, 128, 256), (0.3, -0.125, -3.0, 0.0, -0.0)):
        check(lists.of(dim=dim, scale=scale), visible=visible)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize(("dim", "dtype"), ROWS, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("blocks", [(64, 16), (64, 64), (128, 32), (128, 128)], ids=str)
def test_moving_maximum(make_qkv, check, blocks, dim, dtype, scale, order):
    """Scores that drift by hundreds along the keys, so that the row maximum moves in each tile."""
    case = Case(200, 1000, blocks, 0.4, 0.2, dim=dim, dtype=dtype, scale=scale)
    q, k, v = make_qkv(*case.sizes())
    q[..., 0] = 8
    k[..., 0] = torch.linspace(-16, 16 * order, 1000, device=k.device, dtype=dtype)[:, None]
    check(case.lists(), (q, k, v))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_heavy_rows(make_qkv, check, blocks):
    """A few rows, of some heads, hold most of the blocks; each head alone gives the same bits."""
    case = Case(1100, 1100, blocks, 0.02, 0.02, batch=2, heads=6, heads_kv=3, dim=128)
    kinds = case.kinds()
    kinds[0, ::2, 5] = FULL
    kinds[1, 4, -3:] = FULL
    lists, given = case.lists(kinds), make_qkv(*case.sizes())
    out, lse = check(lists, given)
    for b, h in ((0, 0), (0, 1), (1, 4)):
        own = case.with_(batch=1, heads=1, heads_kv=1)
        alone = [
            None if x is None else x[b : b + 1, h : h + 1].contiguous()
            for x in lists.tensors("cpu")
        ]
        q, k, v = (x[b : b + 1] for x in given)
        q, k, v = q[:, :, h : h + 1], k[:, :, h // 2 : h // 2 + 1], v[:, :, h // 2 : h // 2 + 1]
        expected = out[b : b + 1, :, h : h + 1], lse[b : b + 1, :, h : h + 1]
        assert same(attend(type(lists)(own, *alone), q, k, v), expected)


@pytest.mark.parametrize("partial", [0, 0.3])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_same_bits_every_time(make_qkv, blocks, partial):
    drawn = Case(1200, 1300, blocks, 0.2, partial, True, 2, 8, 2).lists()
    for dim in (64, 96, 128, 256):
        lists = drawn.of(dim=dim)
        given = make_qkv(*lists.case.sizes())
        expected = attend(lists, *given)
        for _ in range(5):
            assert same(attend(lists, *given), expected)


def test_lse_is_optional(make_qkv):
    lists = Case(200, 300).lists()
    q, k, v = make_qkv(*lists.case.sizes())
    out = sparse_fmha.block_sparse_attention(q, k, v, lists.mask(q.device))
    assert out.equal(attend(lists, q, k, v)[0])
