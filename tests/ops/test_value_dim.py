"""Values of another head dim than q and k, on the CPU: every mechanism, gradients, and torch."""

import pytest
import skip_cases
import torch
from bias_cases import BY_MECHANISM, FORMS, biased, differentiated
from gradient_cases import CASES, LARGE
from gradient_oracle import attend, gradients
from gradient_rule import assert_as_good_as_torch, output_gradients
from output_rule import assert_as_good_as_rounded
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_fmha
from sparse_fmha import _C, reference

OPS = torch.ops.sparse_fmha
INF = float("inf")
DIMS = ((24, 8), (8, 40), (16, 136), (192, 128))  # of q and k, and of v
mechanisms = pytest.mark.parametrize("name", BY_MECHANISM.values(), ids=BY_MECHANISM)


def of(case, place, dtype=torch.float64):
    """A case and its arguments; some have a bias of keys or a soft cap, too."""
    dim, value_dim = DIMS[place % len(DIMS)]
    sizes = {"seed": place, "dim": dim, "value_dim": value_dim}
    if place % 3 == 0:
        case, arguments = biased(case, FORMS[place // 3 % 4], dtype, **sizes)
    else:
        arguments = case.arguments(dtype, **sizes)
    return case, arguments | ({"softcap": 2.0} if place % 5 == 0 else {})


def finite(lse):
    return lse.masked_fill(lse == -INF, 0).double()


@pytest.mark.parametrize("place", range(len(CASES)), ids=list(CASES))
def test_every_mechanism_in_fp64(place):
    """out and lse, and gradients through both; the scale is by q's head dim."""
    case, arguments = of(list(CASES.values())[place], place)
    out, lse, by, found = differentiated(case, arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    assert out.shape == (*arguments["q"].shape[:-1], arguments["v"].shape[-1])
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(finite(lse), exact_lse, rtol=1e-6, atol=1e-6)
    for name, expected in gradients(case.mechanism, arguments, *by).items():
        rtol, atol = (1e-5, 1e-6) if name == "key_bias" else (1e-9, 1e-10)
        torch.testing.assert_close(found[name].double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("place", range(3), ids=str)
@pytest.mark.parametrize("name", ["dense, more keys", "2-D, dilation", "blocks 128x16", "stripes"])
def test_errors_are_those_of_the_dtype(name, place):
    """Over several tiles, whose shape the cost model chooses."""
    dtype = (torch.float16, torch.bfloat16, torch.float32)[place]
    dim, value_dim = DIMS[(place + len(name)) % len(DIMS)]
    case = LARGE[name]
    arguments = case.arguments(dtype, dim=dim, value_dim=value_dim)
    out, lse = case.forward(arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(finite(lse), exact_lse, rtol=2e-6, atol=1e-5)
    assert_as_good_as_rounded(case, arguments, out, exact)
    dout, _ = output_gradients(out, lse)
    found = case.backward(arguments, out, lse, dout)
    assert_as_good_as_torch(case, arguments, found, dout, lse)


@pytest.mark.parametrize(("dims", "tile"), [((64, 128), 80), ((192, 128), 80), ((64, 136), 80)])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_are_skipped_together(dims, tile, causal):
    """Those of the Hopper row for both head dims, in the forward and in the backward pass."""
    dim, value_dim = dims
    q, k, v = skip_cases.inputs(330, heads=2, heads_kv=1, dim=dim, batch=1, value_dim=value_dim)
    visible = torch.ones(330, 330, dtype=torch.bool)
    ranks = reference.tile_ranks(330, tile, descending=True)
    stats = skip_cases.check(
        sparse_fmha.attention,
        *(q, k, v, visible.tril() if causal else visible, skip_cases.rows(330)),
        ranks.expand(1, 6, 330),
        0.3,
        causal=causal,
    )
    assert stats.skipped.any()


@mechanisms
def test_gradcheck(name):
    case = CASES[name]
    arguments = case.arguments(dim=16, value_dim=8)
    own = [arguments.pop(n).requires_grad_() for n in "qkv"]

    def run(*leaves):
        out, lse = case.forward({**arguments, **dict(zip("qkv", leaves, strict=True))})
        return out, lse.masked_fill(lse == -INF, 0)

    # lse is in fp32, so only its gradient is exact.
    assert torch.autograd.gradcheck(lambda *x: run(*x)[0], own)


@mechanisms
def test_the_dispatcher_knows_the_shapes(name):
    case = CASES[name]
    arguments = case.arguments(torch.float32, dim=16, value_dim=40)
    op = getattr(OPS, f"{case.mechanism}_fwd")
    wanted = {n: x.requires_grad_() if n in ("q", "k", "v") else x for n, x in arguments.items()}
    torch.library.opcheck(op, (), wanted)
    for given in (wanted, {n: x for n, x in wanted.items() if n in arguments}):
        out, lse = op(**given)
    backward = getattr(OPS, f"{case.mechanism}_bwd")
    plain = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    saved = {"dout": out.detach(), "dlse": None, "out": out.detach(), "lse": lse.detach()}
    found = backward(**saved, **plain)
    with FakeTensorMode() as mode:
        made = {
            n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for n, x in (saved | plain).items()
        }
        fake = backward(**made)
    assert [x.shape for x in found] == [x.shape for x in fake]
    assert found[2].shape == plain["v"].shape


def small(randn, dim=24, value_dim=40, dtype=torch.float32):
    q, k = (randn(2, 37, heads, dim, dtype=dtype, seed=heads) for heads in (4, 2))
    return q, k, randn(2, 37, 2, value_dim, dtype=dtype, seed=9)


def test_like_torch(randn):
    """Of all that torch's attention takes, with autocast."""
    q, k, v = (x.transpose(1, 2) for x in small(randn))
    for causal in (False, True):
        options = {"is_causal": causal, "enable_gqa": True}
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(sparse_fmha.sdpa(q, k, v, **options), expected)
        with sparse_fmha.route_sdpa() as routes:
            routed = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        assert routes.routed == 1
        torch.testing.assert_close(routed, expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_fmha.sdpa(q, k, v, enable_gqa=True)
    assert (out.dtype, out.shape) == (torch.bfloat16, (2, 4, 37, 40))


def test_transforms(randn):
    q, k, v = small(randn)
    for function in (
        lambda q, k, v: sparse_fmha.attention(q, k, v, causal=True, return_lse=True),
        lambda q, k, v: sparse_fmha.neighborhood_attention(q, k, v, 5, return_lse=True),
    ):
        expected = function(q, k, v)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert all(a.equal(b) for a, b in zip(compiled(q, k, v), expected, strict=True))
        mapped = torch.vmap(function)(*(x[:, None] for x in (q, k, v)))
        assert all(a[:, 0].equal(b) for a, b in zip(mapped, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"sink": torch.zeros(4)}, {"skip_threshold": 0.01}])
def test_public_functions(randn, options):
    """All results are those of values that are padded with columns of zeros."""
    q, k, v = small(randn, 24, 16)
    padded = torch.nn.functional.pad(v, (0, 8))
    blocks = sparse_fmha.BlockMask.from_dense(torch.ones(1, 1, 37, 37, dtype=torch.bool), 64, 16)
    columns = torch.ones(1, 1, 1, 37, dtype=torch.bool)
    stripes = sparse_fmha.StripeMask.from_columns(columns, 37, 64)
    for function, rest in (
        (sparse_fmha.attention, ()),
        (sparse_fmha.neighborhood_attention, (9,)),
        (sparse_fmha.block_sparse_attention, (blocks,)),
        (sparse_fmha.stripe_attention, (stripes,)),
    ):
        out, lse = function(q, k, v, *rest, return_lse=True, **options)
        wide, wide_lse = function(q, k, padded, *rest, return_lse=True, **options)
        torch.testing.assert_close(out, wide[..., :16])
        torch.testing.assert_close(lse, wide_lse)


def test_without_keys_and_without_rows(randn):
    q, k, v = small(randn)
    out, lse = sparse_fmha.attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert out.eq(0).all()
    assert out.shape == (2, 37, 4, 40)
    assert lse.eq(-INF).all()
    assert sparse_fmha.attention(q[:, :0], k, v).shape == (2, 0, 4, 40)


def test_layouts(randn):
    """Strided, of a wider tensor, and where the copy of values alone is needed."""
    q, k, v = small(randn)
    expected = sparse_fmha.attention(q, k, v)
    wide = torch.cat([v, v], -1)[..., :40]
    first = v.transpose(1, 2).contiguous().transpose(1, 2)
    for values in (wide, first, v.clone()):
        assert sparse_fmha.attention(q, k, values).equal(expected)


def test_functions_that_need_one_head_dim(randn):
    q, k, v = small(randn, 32, 16)
    wants = "must have q's head dim, 32, got 16; attention, block_sparse_attention, "
    cu = torch.tensor([0, 37], dtype=torch.int32)
    packed = [x[0] for x in (q, k, v)]
    with pytest.raises(ValueError, match=f"v {wants}"):
        sparse_fmha.varlen_attention(*packed, cu, cu, 37, 37)
    with pytest.raises(ValueError, match=f"v_cache {wants}"):
        sparse_fmha.decode_attention(q[:, :1], k, v, torch.full((2,), 37, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"v {wants}"):
        sparse_fmha.patterns.ssa_attention(q, k, v)
    with pytest.raises(RuntimeError, match="v must have k's shape"):
        OPS.varlen_fwd(*packed, cu, cu, 37, 37)
    with pytest.raises(RuntimeError, match="v_cache must have q's head dim, 32, got 16"):
        OPS.decode(q[:, :1], k, v, torch.full((2,), 37, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": (2, 37, 2, 260)}, "head dim of v must be a multiple of 8 from 8 to 256, got 260"),
        ({"v": (2, 37, 2, 264)}, "head dim of v must be a multiple of 8 from 8 to 256, got 264"),
        ({"k": (2, 37, 2, 40)}, "k must have q's head dim, 24, got 40"),
        ({"v": (2, 36, 2, 40)}, "v must have k's shape but for the head dim"),
    ],
)
def test_errors(randn, change, message):
    q, k, v = small(randn)
    given = {"q": q, "k": k, "v": v} | {n: torch.zeros(shape) for n, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        sparse_fmha.attention(**given)
    with pytest.raises(RuntimeError, match=message):
        OPS.fmha_fwd(**given)


def test_backward_errors(randn):
    q, k, v = small(randn)
    out, lse = OPS.fmha_fwd(q, k, v)
    message = r"must have q's shape with v's head dim, 40, of \[2, 37, 4, 24\], got"
    for name in ("out", "dout"):
        given = {"dout": out, "dlse": None, "out": out, "lse": lse, "q": q, "k": k, "v": v}
        with pytest.raises(RuntimeError, match=f"{name} {message}"):
            OPS.fmha_bwd(**(given | {name: q}))


def test_extra_tokens_have_their_own_dims(randn):
    q, k, v = small(randn)
    extra_k, extra_v = (randn(2, 5, 2, dim, dtype=q.dtype) for dim in (24, 40))
    sparse_fmha.neighborhood_attention(q, k, v, 5, extra_k=extra_k, extra_v=extra_v)
    with pytest.raises(ValueError, match=r"extra_v must have shape \[2, any, 2, 40\], got"):
        sparse_fmha.neighborhood_attention(q, k, v, 5, extra_k=extra_k, extra_v=extra_k)


def test_the_row_fits_both_head_dims():
    """The smallest for q and k that is large enough for v."""
    listed = {"mechanism": "dense", "dtype": "float32"}
    assert _C.find_kernel("cpu", **listed, head_dim=8, value_dim=256)["value_dim"] == 256
    with pytest.raises(RuntimeError, match="head_dim=64, value_dim=264"):
        _C.find_kernel("cpu", **listed, head_dim=64, value_dim=264)
    tensors = [torch.empty(1, 64, 2, dim, dtype=torch.float16, device="meta") for dim in (64, 32)]
    found = sparse_fmha.explain(sparse_fmha.attention, tensors[0], *tensors, arch="sm80")
    assert found.kernel is None  # these kernels have one width
    assert all("values of q's head dim" in why for why in found.rejected.values() if "sm80" in why)


def test_flops_count_both_head_dims(randn):
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (x.requires_grad_() for x in small(randn))
    with FlopCounterMode(display=False) as counter:
        sparse_fmha.attention(q, k, v).sum().backward()
    pairs = 2 * 4 * 37 * 37
    assert counter.get_total_flops() == 2 * pairs * (24 + 40 + 3 * 24 + 2 * 40)
