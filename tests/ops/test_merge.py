"""`merge` of what the public functions return, over keys that are cut anywhere."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, merge
from sparse_fmha._ops import means

merging = importlib.import_module("sparse_fmha.merge")  # the package's name is the function's
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def by_dense(q, k, v, visible):
    """Only of all keys or none of them."""
    if not visible.all():
        k, v = k[:, :0], v[:, :0]
    return sparse_fmha.attention(q, k, v, return_lse=True)


def by_blocks(q, k, v, visible):
    mask = BlockMask.from_dense(visible)
    return sparse_fmha.block_sparse_attention(q, k, v, mask, return_lse=True)


def by_stripes(q, k, v, visible):
    """A column list for each group of 64 queries, which see the same."""
    rows = visible[:, :, ::64]
    columns = rows.int().argsort(dim=-1, descending=True, stable=True).int()
    mask = StripeMask(columns, rows.sum(-1).int(), q.shape[1], k.shape[1], 64)
    return sparse_fmha.stripe_attention(q, k, v, mask, return_lse=True)


FUNCTIONS = (by_dense, by_blocks, by_stripes)


@given(
    cuts=st.lists(st.integers(0, 90), max_size=4),
    functions=st.lists(st.sampled_from(FUNCTIONS), min_size=5, max_size=5),
    share=st.sampled_from((0.0, 0.3, 1.0)),
    q_len=st.sampled_from((0, 1, 70)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_parts_are_the_whole(randn, cuts, functions, share, q_len, dtype, seed):
    """Each part by another function; some without keys, for some queries or for all."""
    q = randn(2, q_len, 4, 16, dtype=dtype, seed=seed)
    k, v = (randn(2, 90, 2, 16, dtype=dtype, seed=seed + n) for n in (1, 2))
    generator = torch.Generator().manual_seed(seed)
    groups = torch.rand(1, 4, -(-q_len // 64), 90, generator=generator) < share
    visible = groups.repeat_interleave(64, 2)[:, :, :q_len]
    edges = [0, *sorted(cuts), 90]
    parts = []
    for start, end, function in zip(edges, edges[1:], functions, strict=False):
        part = visible[..., start:end]
        if function is by_dense:  # sees all of its keys or none
            part[:] = visible[..., start:end].all()
        parts.append(function(q, k[:, start:end], v[:, start:end], part.contiguous()))
    out, lse = merge(*zip(*parts, strict=True))
    exact, exact_lse = sparse_fmha.reference.attention(q, k, v, visible)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    eps = max(4 * torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_the_whole_grid_in_parts(randn):
    """Two halves of the extra tokens' keys, beside a grid: ranks above four."""
    q, k, v = (randn(1, 6, 7, 2, 16, seed=n) for n in range(3))
    near = sparse_fmha.neighborhood_attention(q, k, v, (3, 4), return_lse=True)
    flat = q.flatten(1, 2)
    text, text_v = (randn(1, 5, 2, 16, seed=n) for n in (3, 4))
    far = sparse_fmha.attention(flat, text, text_v, return_lse=True)
    far = [x.unflatten(1, (6, 7)) for x in far]
    out, lse = merge(*zip(near, far, strict=True))
    together = sparse_fmha.neighborhood_attention(
        q, k, v, (3, 4), extra_k=text, extra_v=text_v, return_lse=True
    )
    torch.testing.assert_close((out, lse), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_part_without_keys_may_hold_anything(randn, value):
    out = randn(1, 5, 2, 8)
    lse = randn(1, 5, 2)
    nothing = torch.full_like(out, value), torch.full_like(lse, -torch.inf)
    for parts in ([(out, lse), nothing], [nothing, (out, lse), nothing]):
        torch.testing.assert_close(merge(*zip(*parts, strict=True)), (out, lse))
    merged, merged_lse = merge(*zip(nothing, nothing, strict=True))
    assert merged.eq(0).all()
    assert merged_lse.eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_few_rows_at_a_time(randn, monkeypatch, parts, rows, dtype):
    """Without derivatives; the same as with them, also in memory of the first part."""
    heads = 3
    monkeypatch.setattr(means, "CACHED", rows * 2 * heads * 8)
    outs = [randn(2, 7, 5, 8, dtype=dtype, seed=n)[:, :, :heads] for n in range(parts)]
    lses = [3 * randn(2, 7, 5, seed=9 + n)[:, :, :heads] for n in range(parts)]
    lses[0][:, 2] = -torch.inf
    outs[0][:, 2] = 0
    expected = merge([x.clone().requires_grad_() for x in outs], lses)
    before = [x.clone() for x in (*outs, *lses)]
    found = merge(outs, lses)
    assert all(x.equal(y) for x, y in zip((*outs, *lses), before, strict=True))
    inside = merging.merge_into_first(outs, lses)
    assert inside[0].data_ptr() == outs[0].data_ptr()
    eps = 4 * torch.finfo(dtype).eps
    for out, lse in (found, inside):
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(out, expected[0].detach(), rtol=eps, atol=eps)
        assert lse.equal(expected[1])


def test_parts_that_want_derivatives_stay_as_they_are(randn):
    outs = [randn(1, 5, 2, 8, seed=n).requires_grad_() for n in range(2)]
    lses = [randn(1, 5, 2, seed=n) for n in range(2)]
    before = outs[0].clone()
    merging.merge_into_first(outs, lses)[0].sum().backward()
    assert outs[0].equal(before)
    assert outs[0].grad is not None


@pytest.mark.parametrize("wants", [False, True])
def test_a_graph_merges_into_the_first_part(randn, wants):
    """Without derivatives; what goes into the graph stays as it is."""
    torch.compiler.reset()
    outs = [randn(1, 5, 2, 8, seed=n) for n in range(2)]
    lses = [randn(1, 5, 2, seed=n) for n in range(2)]
    names = []

    def graph(module, inputs):
        names.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    @torch.compile(backend=graph, fullgraph=True)
    def compiled(first, other):
        return merging.merge_into_first((first * 2, other), lses)

    given = outs[0].clone().requires_grad_(wants)
    found = compiled(given, outs[1])
    expected = merge((outs[0] * 2, outs[1]), lses)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert given.equal(outs[0])
    assert any("write_mean" in name for name in names) == (not wants)
    if wants:
        found[0].sum().backward()
        assert given.grad.isfinite().all()


def test_the_op_has_no_derivatives(randn):
    first, weights = randn(1, 5, 2, 8).requires_grad_(), torch.ones(2, 1, 5, 2)
    with pytest.raises(NotImplementedError, match="write_mean has no derivatives"):
        torch.ops.sparse_fmha.write_mean(first, [randn(1, 5, 2, 8)], weights)


OUT, LSE = torch.zeros(1, 5, 2, 8), torch.zeros(1, 5, 2)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (
            (),
            (),
            ValueError,
            "outs and lses must have the same number of parts, at least one, got 0",
        ),
        ((OUT, None), (LSE, LSE), TypeError, r"outs\[1\] must be a tensor, got NoneType"),
        ((OUT, OUT), (LSE, 0.0), TypeError, r"lses\[1\] must be a tensor, got float"),
        ((OUT.int(),), (LSE,), TypeError, r"outs\[0\] must have .*dtype.*, got torch.int32"),
        ((OUT,), (LSE.long(),), TypeError, r"lses\[0\] must have .*dtype.*, got torch.int64"),
        (
            (OUT, OUT),
            (LSE, LSE.double()),
            TypeError,
            r"lses\[1\] must have the dtype of lses\[0\], torch.float32, got",
        ),
        (
            (OUT, OUT.to("meta")),
            (LSE, LSE),
            ValueError,
            r"outs\[1\] must be on the device of outs\[0\], cpu, got meta",
        ),
        (
            (OUT,),
            (LSE.to("meta"),),
            ValueError,
            r"lses\[0\] must be on the device of outs\[0\], cpu, got meta",
        ),
        (
            (OUT, OUT[:, :1]),
            (LSE, LSE),
            ValueError,
            r"outs\[1\] must have .*, got .*\[1, 1, 2, 8\]",
        ),
    ],
)
def test_errors(outs, lses, error, message):
    with pytest.raises(error, match=message):
        merge(outs, lses)
