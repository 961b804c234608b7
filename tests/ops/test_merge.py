"""`merge` of what the public functions return, over keys that are cut anywhere."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, merge

merging = importlib.import_module("sparse_fmha.merge")  # the package's name is the function's
OPS = torch.ops.sparse_fmha
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


def draw(randn, parts, shape, dtype, cut=...):
    """Parts without keys in some rows, which hold NaN there; row 0 has keys in none."""
    outs = [randn(*shape, dtype=dtype, seed=n) for n in range(parts)]
    lses = [3 * randn(*shape[:-1], seed=9 + n) for n in range(parts)]
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        none = (randn(*shape[:-1], seed=50 + n) > 0.7).index_fill_(1, torch.tensor(0), True)
        lse.masked_fill_(none, -torch.inf)
        out.masked_fill_(none[..., None], torch.nan)
    return [x[cut] for x in outs], [x[cut] for x in lses]


def assert_merged(found, outs, lses):
    """Compares with the definition in fp64, and what the call with derivatives returns."""
    out, lse = found
    weights = torch.stack(lses).double().exp()
    whole = weights.sum(0)
    share = (weights / whole).nan_to_num(0)
    exact = sum(
        share[n][..., None] * x.double().nan_to_num(0).masked_fill((share[n] == 0)[..., None], 0)
        for n, x in enumerate(outs)
    )
    assert (out.dtype, lse.dtype) == (outs[0].dtype, torch.float32)
    eps = max(2 * torch.finfo(out.dtype).eps, 1e-15)
    eps = max(eps, 1e-6) if out.dtype != torch.float64 else 1e-12
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps)
    torch.testing.assert_close(lse.double(), whole.log(), rtol=1e-6, atol=1e-6)
    other, other_lse = merge([x.clone().requires_grad_() for x in outs], lses)
    torch.testing.assert_close(out, other.detach(), rtol=eps, atol=eps)
    torch.testing.assert_close(lse, other_lse, rtol=1e-6, atol=1e-6)


ALL = slice(None)
SHAPES = [  # and what is taken of it
    ((2, 7, 5, 8), ...),
    ((2, 7, 5, 8), (ALL, ALL, slice(1, 4))),
    ((1, 3, 4, 5, 2, 72), ...),
    ((4, 9, 117), slice(None, None, 2)),
    ((2, 40, 3, 16), (ALL, slice(5, 6))),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "cut"), SHAPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 32])
def test_one_pass(randn, parts, shape, cut, dtype):
    """Without derivatives, in new memory and in that of the first part."""
    outs, lses = draw(randn, parts, shape, dtype, cut)
    before = [x.clone() for x in (*outs, *lses)]
    found = merge(outs, lses)
    assert found[0].is_contiguous()
    assert_merged(found, outs, lses)
    for x, y in zip((*outs, *lses), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    inside = merging.merge_into_first(outs, lses)
    assert inside[0].data_ptr() == outs[0].data_ptr()
    assert inside[0].equal(found[0])
    assert inside[1].equal(found[1])


def test_other_strides(randn):
    outs, lses = draw(randn, 2, (2, 6, 3, 8), torch.float32)
    columns_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in outs]
    assert_merged(merge(columns_first, lses), columns_first, lses)
    assert_merged(merging.merge_into_first(columns_first, lses), columns_first, lses)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in lses]
    shared = [x[:1].expand(2, -1, -1) for x in lses]
    assert_merged(merge(outs, turned), outs, lses)
    outs = [randn(2, 6, 3, 8, seed=n) for n in range(2)]
    assert_merged(merge(outs, shared), outs, shared)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_lse_that_is_not_finite_stays(randn, value):
    outs, lses = ([randn(1, 3, 1, *d, seed=n) for n in range(2)] for d in ((8,), ()))
    lses[1][0, 1] = value
    for found in (merge(outs, lses), merge([x.requires_grad_() for x in outs], lses)):
        assert found[1][0, 1].equal(torch.full((1,), value)) or value != value
        assert found[1][0, 1].isfinite().logical_not()
        assert found[0][0, 1].isnan().all()
        assert found[0][0, ::2].isfinite().all()


@pytest.mark.parametrize("change", ["40 parts", "fp64 lse", "many dimensions", "meta"])
def test_what_the_op_does_not_take(randn, change):
    shape = (1, 2, 1, 2, 1, 2, 4) if change == "many dimensions" else (1, 3, 2, 4)
    outs, lses = draw(randn, 40 if change == "40 parts" else 2, shape, torch.float32)
    if change == "meta":
        out, lse = merge([x.to("meta") for x in outs], [x.to("meta") for x in lses])
        assert (out.shape, lse.shape, out.device.type) == (shape, shape[:-1], "meta")
        return
    if change == "fp64 lse":
        out, lse = merge(outs, [x.double() for x in lses])
        assert lse.dtype == torch.float64
        lse = lse.float()
    else:
        out, lse = merging.merge_into_first([x.clone() for x in outs], lses)
    assert_merged((out, lse), outs, lses)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(randn, dtype):
    outs, lses = draw(randn, 3, (2, 5, 2, 8), dtype)
    torch.library.opcheck(OPS.merge, ([x.nan_to_num(0) for x in outs], lses))
    first, *others = (x.nan_to_num(0) for x in outs)
    torch.library.opcheck(OPS.merge_into, (first, others, lses))


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([(2, 3, 8)], [(2, 3), (2, 3)], "the same number of parts, from 1 to 32, got 1 and 2"),
        ([(2, 3, 8)] * 33, [(2, 3)] * 33, "from 1 to 32, got 33 and 33"),
        ([(2, 3, 8), (2, 3, 4)], [(2, 3)] * 2, r"outs\[1\] must have the shape.*got \[2, 3, 4\]"),
        ([(2, 3, 8)], [(2, 4)], r"lses\[0\] must have the shape .*got \[2, 4\]"),
        ([(1,) * 7], [(1,) * 6], "outs must have 1 to 6 dimensions, got shape"),
    ],
)
def test_errors_of_the_op(outs, lses, message):
    with pytest.raises(RuntimeError, match=f"sparse_fmha: .*{message}"):
        OPS.merge([torch.zeros(x) for x in outs], [torch.zeros(x) for x in lses])


def test_dtypes_of_the_op():
    out, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"outs must have dtype float16, .*, got Int"):
        OPS.merge([out.int()], [lse])
    with pytest.raises(RuntimeError, match=r"lses\[0\] must have dtype float32, got Double"):
        OPS.merge([out], [lse.double()])
    with pytest.raises(RuntimeError, match="first must have rows of consecutive elements"):
        OPS.merge_into(out.mT, [], [torch.zeros(2, 8)])


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
    assert any("merge_into" in name for name in names) == (not wants)
    if wants:
        found[0].sum().backward()
        assert given.grad.isfinite().all()


def test_the_ops_have_no_derivatives(randn):
    first, lse = randn(1, 5, 2, 8), randn(1, 5, 2)
    for wants in ([first.clone().requires_grad_(), lse], [first, lse.clone().requires_grad_()]):
        out, of = wants
        with pytest.raises(NotImplementedError, match="merge has no derivatives"):
            OPS.merge([out, first], [of, lse])
        with pytest.raises(NotImplementedError, match="merge_into has no derivatives"):
            OPS.merge_into(first, [out], [lse, of])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, first)
        with pytest.raises(NotImplementedError, match="merge has no derivatives"):
            OPS.merge([first, dual], [lse, lse])


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
