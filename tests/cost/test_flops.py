"""What torch's counter of FLOPs says of the ops, beside the pairs that masks show."""

import pytest
import torch
from op_calls import CALLS, run
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, reference
from sparse_fmha.cost.flops import PAIRS

HEADS, DIM, BATCH = 4, 16, 2


def counted(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def qkv(*grid, keys=None, **options):
    q = torch.randn(BATCH, *grid, HEADS, DIM, **options)
    k, v = (torch.randn(BATCH, *(keys or grid), 2, DIM, **options) for _ in range(2))
    return q, k, v


def forward(visible):
    """From a mask of one head."""
    return 4 * BATCH * HEADS * DIM * int(visible.sum())


@pytest.mark.parametrize("lengths", [(70, 70), (33, 70), (70, 33), (1, 70)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dense(lengths, causal):
    rows, columns = lengths
    visible = torch.ones(rows, columns, dtype=torch.bool)
    if causal:
        visible = visible.tril(columns - rows)
    q, k, v = qkv(rows, keys=(columns,))
    assert counted(sparse_fmha.attention, q, k, v, causal=causal) == forward(visible)


@pytest.mark.parametrize("grid", [(23,), (24,), (9, 7)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (7, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_neighborhood(grid, window, stride, dilation, causal):
    options = min(stride, window), dilation, causal
    if window * dilation > min(grid) and not causal:
        pytest.skip("a window larger than the grid")
    visible = reference.neighborhood_mask(grid, window, *options)
    names = ("stride", "dilation", "causal")
    got = counted(
        sparse_fmha.neighborhood_attention,
        *qkv(*grid),
        window,
        **dict(zip(names, options, strict=True)),
    )
    assert got == forward(visible)


def test_axes_that_differ_and_extra_tokens():
    grid, options = (4, 9, 7), ((2, 20, 3), (2, 3, 1), (1, 2, 1), (False, True, False))
    visible = reference.neighborhood_mask(grid, *options, extra=5)
    extra = torch.randn(BATCH, 5, 2, DIM)
    window, stride, dilation, causal = options
    given = {"stride": stride, "dilation": dilation, "causal": causal}
    got = counted(
        sparse_fmha.neighborhood_attention,
        *qkv(*grid),
        window,
        **given,
        extra_k=extra,
        extra_v=extra,
    )
    assert got == forward(visible)


@pytest.mark.parametrize(
    ("needed", "products"), [("qkv", 5), ("q", 3), ("v", 4), ("", 0)], ids=lambda x: str(x)
)
def test_backward(needed, products):
    q, k, v = qkv(9, 7)
    for name, x in zip("qkv", (q, k, v), strict=True):
        x.requires_grad_(name in needed)
    with FlopCounterMode(display=False) as counter:
        out = sparse_fmha.neighborhood_attention(q, k, v, 3)
        if needed:
            out.sum().backward()
    assert counter.get_total_flops() == BATCH * HEADS * DIM * 63 * 9 * (4 + 2 * products)


def blocks(device="cpu"):
    visible = torch.rand(2, HEADS, 150, 200) < 0.01
    visible[..., 64:128, 64:128] = True
    return BlockMask.from_dense(visible.to(device), 64, 32)


def test_blocks():
    """Whole blocks, as far as there are tokens."""
    mask = blocks()
    q, k, v = qkv(150, keys=(200,))
    lists = torch.zeros(BATCH, HEADS, 3, 7, dtype=torch.bool)
    for counts, indices in (
        (mask.counts, mask.indices),
        (mask.partial_counts, mask.partial_indices),
    ):
        for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            lists[(*place, indices[tuple(place)][: counts[tuple(place)]].long())] = True
    assert 0 < mask.counts.sum() < mask.partial_counts.sum() < lists.numel()
    listed = lists.repeat_interleave(64, 2)[:, :, :150].repeat_interleave(32, 3)[..., :200]
    assert counted(sparse_fmha.block_sparse_attention, q, k, v, mask) == 4 * DIM * int(listed.sum())


def test_one_list_for_all_heads():
    chosen = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    chosen[..., 1] = True
    mask = BlockMask.from_blocks(chosen, 100, 100, 64, 32)
    got = counted(sparse_fmha.block_sparse_attention, *qkv(100), mask)
    assert got == 4 * BATCH * HEADS * DIM * 100 * 32


def test_stripes():
    columns = torch.rand(1, 2, 3, 150) < 0.2
    columns[..., :64] = False
    mask = StripeMask.from_columns(columns.repeat_interleave(2, 1), 150, 64)
    starts, ones = torch.zeros(1, HEADS, 3, 1, dtype=torch.int32), torch.ones(1, HEADS, 3)
    mask = StripeMask(mask.columns, mask.counts, 150, 150, 64, starts, ones.int())
    visible = mask.to_dense()
    got = counted(sparse_fmha.stripe_attention, *qkv(150), mask)
    assert got == 4 * BATCH * DIM * int(visible.sum())


def test_lists_that_cannot_be_read_count_by_their_room():
    mask = blocks()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = qkv(150, keys=(200,))
        got = counted(sparse_fmha.block_sparse_attention, q, k, v, mask)
    room = mask.indices.shape[-1] + mask.partial_indices.shape[-1]
    assert room > 0
    assert got == 4 * BATCH * HEADS * DIM * 150 * 32 * room


def test_a_symbolic_scale_and_modules():
    """By module, and in the ops that compiled graphs with a symbolic scale have."""

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return sparse_fmha.attention(q, k, v)

    module = Attention()
    with FlopCounterMode(display=False) as counter:
        module(*qkv(20))
    assert counter.get_flop_counts()["Attention"] == counter.get_flop_counts()["Global"]
    scale = torch.ones((), dtype=torch.float64)
    got = counted(torch.ops.sparse_fmha.fmha_fwd_symbolic, *qkv(20), False, scale)
    assert got == forward(torch.ones(20, 20))


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(tuple(PAIRS))])
def test_every_op_of_attention_is_counted(name):
    assert counted(run, name) > 0


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal):
    queries, keys = (5, 0, 30, 7), (9, 4, 30, 3)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
    q = torch.randn(sum(queries), HEADS, DIM)
    k, v = (torch.randn(sum(keys), 2, DIM) for _ in range(2))
    pairs = 0
    for rows, columns in zip(queries, keys, strict=True):
        visible = torch.ones(rows, columns, dtype=torch.bool)
        pairs += int((visible.tril(columns - rows) if causal else visible).sum())
    got = counted(
        sparse_fmha.varlen_attention, q, k, v, cu_q, cu_k, max(queries), max(keys), causal=causal
    )
    assert got == 4 * HEADS * DIM * pairs


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, (40, 70)),
        ({"window": 50}, (40, 50)),
        ({"softcap": 5.0}, (40, 70)),
        ({"tokens": 9}, (9, 9)),
        ({"blocks": 2}, (32, 32)),
    ],
    ids=str,
)
def test_decode(options, keys):
    q, k, v = qkv(1, keys=(80,))
    lengths = torch.tensor([40, 70], dtype=torch.int32)
    if "tokens" in options:
        places = torch.arange(9, dtype=torch.int32).expand(BATCH, 1, 2, 9).contiguous()
        options = {"tokens": (places, torch.full((BATCH, 1, 2), 9, dtype=torch.int32))}
    if "blocks" in options:
        places = torch.arange(2, dtype=torch.int32).expand(BATCH, 2, 2).contiguous()
        options = {"blocks": (places, torch.full((BATCH, 2), 2, dtype=torch.int32), 16)}
    got = counted(sparse_fmha.decode_attention, q, k, v, lengths, **options)
    assert got == 4 * HEADS * DIM * sum(keys)
