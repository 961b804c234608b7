"""block_sparse_attention on the GPU: entries that lists may have, where tensors lie, and sizes."""

import pytest
import torch
from block_lists import (
    BLOCKS,
    FULL,
    NONE,
    PARTIAL,
    Case,
    Lists,
    attend,
    attend_raw,
    checker,
    compact,
    same,
)
from neighborhoods import LAYOUTS, amid_nan, laid_out

import sparse_fmha

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def check(make_qkv, agrees):
    return checker(make_qkv, agrees)


@pytest.fixture
def no_cache():
    """Large tensors are given back."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_nothing_listed(make_qkv, blocks, dim):
    case = Case(300, 300, blocks, batch=2, dim=dim)
    given = make_qkv(*case.sizes())
    nothing = torch.zeros(case.grid, dtype=torch.long)
    for causal in (False, True):
        lists = case.with_(causal=causal).lists(nothing)
        for one in (lists, lists.with_(indices=lists.indices[..., :0].contiguous())):
            out, lse = attend(one, *given)
            assert out.eq(0).all()
            assert lse.eq(-torch.inf).all()
    bits = torch.zeros(*case.grid, *blocks[:1], blocks[1] // 8, dtype=torch.uint8)
    partial = case.lists(torch.full(case.grid, PARTIAL)).with_(partial_bits=bits)
    out, lse = attend(partial, *given)  # listed, with no bit set
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("blocks", [(64, 32), (128, 128)], ids=str)
def test_strides(make_qkv, check, blocks, layout, dim):
    """The same bits, wherever the tensors lie and whatever lies around them."""
    case = Case(300, 333, blocks, 0.4, 0.2, batch=2, heads=4, heads_kv=2, dim=dim)
    plain = make_qkv(*case.sizes())
    lists = case.lists()
    expected = check(lists, plain)
    assert same(attend(lists, *laid_out(layout, plain)), expected)


@pytest.mark.parametrize("lengths", [(65, 77), (200, 401), (333, 129)], ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_nothing_beyond_the_end_is_used(make_qkv, check, blocks, lengths):
    """NaN beyond the last query and key, where the last blocks reach."""
    drawn = Case(*lengths, blocks, 0.6, 0.4, batch=2).lists()
    visible = drawn.visible()
    for dim in (64, 72, 128, 256):
        lists = drawn.of(dim=dim)
        plain = make_qkv(*lists.case.sizes())
        expected = check(lists, plain, visible=visible)
        assert same(attend(lists, *(amid_nan(x, 1) for x in plain)), expected)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_bad_batch_and_head_stay_alone(make_qkv, blocks, dim):
    """One head of one batch is NaN: nothing of it is left in the memory of what comes after it."""
    case = Case(450, 450, blocks, 0.3, 0.2, batch=3, heads=8, heads_kv=4, dim=dim)
    lists, given = case.lists(), make_qkv(*case.sizes())
    expected, expected_lse = attend(lists, *given)
    for place in (1, 2):
        bad = [x.clone() for x in given]
        bad[place][1, :, 2] = torch.nan
        out, lse = attend(lists, *bad)
        seen = expected_lse[1, :, 4:6].isfinite()
        assert out[1, :, 4:6][seen].isnan().all()
        out[1, :, 4:6], lse[1, :, 4:6] = expected[1, :, 4:6], expected_lse[1, :, 4:6]
        assert same((out, lse), (expected, expected_lse))


@pytest.mark.parametrize(
    ("place", "value"),
    [(1, torch.nan), (1, torch.inf), (1, -torch.inf), (2, 3e38), (2, -3e38)],
    ids=lambda x: "qkv"[x] if isinstance(x, int) else str(x),
)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_token_reaches_who_sees_it(make_qkv, blocks, place, value):
    """The other rows are the same bits, also where they share a tile with it.

    What they do not see may be any key, and any finite value: a weight of 0 times NaN is NaN.
    """
    case = Case(450, 450, blocks, 0.3, 0.2, causal=True, dim=128)
    lists, given = case.lists(), make_qkv(*case.sizes())
    expected, expected_lse = attend(lists, *given)
    visible = lists.visible().to(given[0].device)[0]
    for token in (0, 225, 449):
        bad = list(given)
        bad[place] = bad[place].clone()
        bad[place][:, token] = value
        out, lse = attend(lists, *bad)
        hit = visible[:, :, token].T
        assert out[0][~hit].equal(expected[0][~hit])
        assert lse[0][~hit].equal(expected_lse[0][~hit])
        if value is torch.nan:
            assert out[0][hit].isnan().all()


def spoilt(where, valid, junk):
    """Lists [B, H, nQ, width, ...] with as many other entries before, behind or amid them."""
    if where == "amid":
        return torch.stack((junk, valid), 4).flatten(3, 4)
    return torch.cat((junk, valid) if where == "before" else (valid, junk), 3)


@pytest.mark.parametrize("where", ["before", "behind", "amid"])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_entries_out_of_range_are_ignored(check, blocks, where):
    """Negative ones and those after the last block, in either list of the op."""
    case = Case(333, 420, blocks, 0.3, 0.3, batch=2)
    lists = case.lists()
    columns = case.grid[-1]
    bad = torch.tensor([-1, columns, -(2**31), columns + 1, 2**31 - 1, 10**6, -7]).int()

    def entries(counts, indices):
        """All of the wide list counts; where a row ends there are more of them."""
        places = torch.arange(indices.shape[-1])
        junk = bad[places % len(bad)].expand_as(indices)
        valid = torch.where(places < counts[..., None], indices, -1)
        indices = spoilt(where, valid, junk).contiguous()
        return torch.full_like(counts, indices.shape[-1]), indices

    counts, indices = entries(lists.counts, lists.indices)
    partial_counts, partial_indices = entries(lists.partial_counts, lists.partial_indices)
    bits = spoilt(where, lists.partial_bits, torch.full_like(lists.partial_bits, 255))
    wrong = Lists(case, counts, indices, partial_counts, partial_indices, bits.contiguous())
    visible = lists.visible()
    for dim in (64, 128, 256):
        check(wrong.of(dim=dim), run=attend_raw, visible=visible)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_counts_are_clamped(make_qkv, check, blocks, dim):
    """To the width of the list, and to 0."""
    case = Case(333, 420, blocks, batch=2, dim=dim)
    kinds = torch.full(case.grid, FULL)
    kinds[..., ::3] = PARTIAL
    lists = case.lists(kinds)
    width, partial_width = int(lists.counts.max()), int(lists.partial_counts.max())
    exact = lists.with_(
        indices=lists.indices[..., :width].contiguous(),
        partial_indices=lists.partial_indices[..., :partial_width].contiguous(),
        partial_bits=lists.partial_bits[:, :, :, :partial_width].contiguous(),
    )
    given = make_qkv(*case.sizes())
    expected = check(exact, given, attend_raw)
    for count in (max(width, partial_width) + 1, 1000, 2**31 - 1):
        more = torch.full_like(lists.counts, count)
        assert same(attend_raw(exact.with_(counts=more, partial_counts=more), *given), expected)
    for count in (-1, -(2**31)):
        less = torch.full_like(lists.counts, count)
        out, lse = attend_raw(exact.with_(counts=less, partial_counts=less), *given)
        assert out.eq(0).all()
        assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_repeated_entries_do_not_hang(make_qkv, blocks, dim):
    """What they give is not defined."""
    case = Case(333, 420, blocks, batch=2, dim=dim)
    lists = case.lists(torch.full(case.grid, FULL))
    given = make_qkv(*case.sizes())
    for entry in (0, case.grid[-1] - 1):
        out, _ = attend_raw(lists.with_(indices=torch.full_like(lists.indices, entry)), *given)
        assert out.isfinite().all()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_unsorted_indices(make_qkv, blocks, causal, counted):
    """Made into a mask on the device, with -1 among them, they are the sorted ones."""
    case = Case(450, 500, blocks, causal=causal, batch=2, dim=128)
    kinds = case.kinds()
    if causal:  # a mask leaves out what nobody sees, which may change the order of the sums
        last = (torch.arange(1, case.grid[2] + 1) * blocks[0]).clamp(max=450) - 1 + 50
        kinds[..., torch.arange(case.grid[3]) * blocks[1] > last[:, None]] = NONE
    lists, given = case.lists(kinds), make_qkv(*case.sizes())
    width = lists.indices.shape[-1]
    listed = torch.arange(width) < lists.counts[..., None]
    indices = torch.where(listed, lists.indices, -1)
    order = torch.rand(indices.shape, generator=torch.Generator().manual_seed(0))
    if counted:  # what is behind the count is another block, which is not to be seen
        order, indices = torch.where(listed, order, 2), lists.indices
    shuffled = indices.gather(-1, order.argsort(-1)).to(given[0].device)
    counts = lists.counts.to(given[0].device) if counted else None
    mask = sparse_fmha.BlockMask.from_indices(
        counts, shuffled, case.len_q, case.len_kv, *blocks, causal=causal
    )
    results = sparse_fmha.block_sparse_attention(*given, mask, return_lse=True)
    assert same(results, attend(lists, *given))


def at_rows(lists, rows, out, lse, q, k, v, agrees):
    """agrees(), for the query rows listed, where every listed block is full."""
    case, device = lists.case, q.device
    columns = torch.arange(case.len_kv, device=device) // case.blocks[1]
    chosen = torch.zeros(case.grid, dtype=torch.bool)
    places = torch.arange(lists.indices.shape[-1]) < lists.counts[..., None]
    chosen.scatter_(-1, lists.indices.long(), places)
    visible = chosen.to(device)[:, :, rows // case.blocks[0]][..., columns]
    if case.causal:
        last = rows[:, None] + case.len_kv - case.len_q
        visible = visible & (torch.arange(case.len_kv, device=device) <= last)
    one = [x[:, rows].contiguous() for x in (out, lse, q)]
    agrees(*one, k, v, scale=case.scale, visible=visible)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [(64, 16), (64, 64), (128, 16), (128, 128)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_long(make_qkv, agrees, dim, blocks, causal):
    case = Case(32768, 32768, blocks, 0.1, causal=causal, dim=dim)
    lists, given = case.lists(), make_qkv(*case.sizes())
    out, lse = attend(lists, *given)
    rows = torch.linspace(0, 32767, 97, device=out.device).round().long()
    at_rows(lists, rows, out, lse, *given, agrees)


PITCH = 1 << 19  # elements from one token to the next: 2^32 from the first to the last, 8 GiB


@pytest.mark.parametrize("blocks", [(64, 32), (128, 128)], ids=str)
def test_strides_beyond_32_bits(make_qkv, agrees, no_cache, blocks):
    case = Case(8192, 8192, blocks, 0.1, causal=True, heads=1, dim=128)
    lists, plain = case.lists(), make_qkv(*case.sizes())
    buffer = torch.empty(1, 8192, 1, PITCH, dtype=case.dtype, device=plain[0].device)
    given = [buffer[..., i * 1024 :][..., :128].copy_(x) for i, x in enumerate(plain)]
    out, lse = attend(lists, *given)
    at_rows(lists, torch.arange(0, 8192, 91, device=out.device), out, lse, *given, agrees)


def test_output_beyond_32_bits(cuda, randn, agrees, no_cache):
    """2.2e9 elements of q and of out."""
    case = Case(1 << 17, 500, (128, 64), 0.3, heads=132, shared_heads=True, dim=128)
    q = torch.empty(1, case.len_q, 132, 128, dtype=case.dtype, device=cuda).normal_()
    k, v = (randn(1, 500, 1, 128, seed=s) for s in (1, 2))
    assert q.numel() > 1 << 31
    lists = case.lists()
    out, lse = sparse_fmha.block_sparse_attention(q, k, v, lists.mask(cuda), return_lse=True)
    rows = torch.tensor([0, 1, 63550, 127099, 127101, case.len_q - 1], device=cuda)
    at_rows(lists, rows, out, lse, q, k, v, agrees)


def test_bits_beyond_32_bits(cuda, make_qkv, agrees, no_cache):
    """2.3e9 bytes of bits, of which the last rows are looked at."""
    case = Case(32768, 32768, full=0, partial=0, heads=17, heads_kv=1, dim=64)
    q, k, v = make_qkv(*case.sizes())
    counts = torch.full(case.grid[:3], 2, dtype=torch.int32, device=cuda)
    indices = torch.arange(256, dtype=torch.int32, device=cuda).expand(case.grid).contiguous()
    bits = torch.empty(*case.grid, 128, 16, dtype=torch.uint8, device=cuda).random_(256)
    assert bits.numel() > 1 << 31
    out, lse = torch.ops.sparse_fmha.block_sparse_fwd(
        q, k, v, torch.zeros_like(counts), indices, counts, indices, bits, 128, 128
    )
    seen = (bits[:, -1:, -1, :2, :, :, None] >> torch.arange(8, device=cuda)) & 1
    visible = seen.flatten(-2).bool().transpose(2, 3).flatten(-2)  # [1, 1, 128, 256]
    one = [x[:, -128:, -1:].contiguous() for x in (out, lse, q)]
    agrees(*one, k[:, :256], v[:, :256], visible=visible)


def test_empty_batch(make_qkv):
    case = Case(100, 200, shared_batch=True)
    q, k, v = (x[:0] for x in make_qkv(*case.sizes()))
    out, lse = attend(case.lists(), q, k, v)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]


def test_lists_beyond_the_count_are_not_read(make_qkv):
    """Whatever is there, and however wide the list is."""
    lists = Case(333, 700, (64, 32), 0.2).lists()
    given = make_qkv(*lists.case.sizes())
    expected = attend(lists, *given)
    listed = torch.arange(lists.indices.shape[-1]) < lists.counts[..., None]
    for value in (0, -1, 2**31 - 1):
        other = torch.where(listed, lists.indices, value)
        other = torch.nn.functional.pad(other, (0, 50), value=value)
        assert same(attend_raw(lists.with_(indices=other), *given), expected)
    counts, _ = compact(torch.zeros(lists.case.grid, dtype=torch.bool))
    assert attend_raw(lists.with_(counts=counts), *given)[0].eq(0).all()
