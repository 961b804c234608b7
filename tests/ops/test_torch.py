"""The ops as a part of PyTorch: tracing, compiling, autocast, autograd."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_fmha

OPS = torch.ops.sparse_fmha
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# q's grid, its heads, the heads of k and v, the head dim.
SHAPES = [
    ((1,), 1, 1, 8),
    ((17,), 4, 4, 40),
    ((17,), 6, 2, 64),
    ((6, 7), 4, 1, 16),
    ((4, 5, 6), 2, 2, 24),
]


def tensors(randn, grid, heads, heads_kv, dim, dtype=torch.float32, extra=0):
    """q, k and v, and with `extra` also extra_k and extra_v."""
    shapes = [(2, *grid, heads, dim)] + 2 * [(2, *grid, heads_kv, dim)]
    if extra:
        shapes += 2 * [(2, extra, heads_kv, dim)]
    return [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def options(grid):
    """window, stride, dilation and causal of each axis."""
    axes = len(grid)
    return [3] * axes, [2] + [1] * (axes - 1), [1] * axes, [0] * (axes - 1) + [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_opcheck_fmha(randn, shape, causal, dtype):
    q, k, v = tensors(randn, *shape, dtype=dtype)
    torch.library.opcheck(OPS.fmha_fwd, (q, k, v, causal))
    torch.library.opcheck(OPS.fmha_fwd, (q, k[:, :1], v[:, :1], causal, -0.5))


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_opcheck_neighborhood(randn, shape, extra):
    q, k, v, *more = tensors(randn, *shape, extra=extra)
    torch.library.opcheck(OPS.neighborhood_fwd, (q, k, v, *options(shape[0]), 0.25, *more))


def views(x):
    """The tensor as PyTorch users come by it: contiguous, heads first, a slice, expanded heads."""
    return {
        "contiguous": x,
        "heads first": x.transpose(1, -2).contiguous().transpose(1, -2),
        "slice": torch.cat((x, x), -1)[..., : x.shape[-1]],
        "expanded": x[..., :1, :].expand(x.shape),
    }


@pytest.mark.parametrize("layout", views(torch.ones(1, 1, 1, 1)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_tensors(randn, dtype, shape, layout):
    """Tracing sees the shapes, strides and dtypes that the kernels give."""
    real = [views(x)[layout] for x in tensors(randn, *shape, dtype=dtype)]
    calls = [functools.partial(OPS.neighborhood_fwd, *real, *options(shape[0]))]
    if len(shape[0]) == 1:
        calls = [functools.partial(OPS.fmha_fwd, *real)] + (calls if shape[0][0] > 3 else [])
    for call in calls:
        with FakeTensorMode(allow_non_fake_inputs=True):
            traced = call()
        for fake, out in zip(traced, call(), strict=True):
            assert fake.shape == out.shape
            assert fake.stride() == out.stride()
            assert fake.dtype == out.dtype
            assert fake.device == out.device


@pytest.mark.parametrize("layout", views(torch.ones(1, 1, 1, 1)))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_strides_do_not_change_the_result(randn, shape, layout):
    """Reading another layout gives the bits of the contiguous copy."""
    given = [views(x)[layout] for x in tensors(randn, *shape, extra=3)]
    plain = [x.contiguous() for x in given]
    window, stride, dilation, causal = options(shape[0])
    for q, k, v, extra_k, extra_v in (given, plain):
        results = OPS.neighborhood_fwd(
            q, k, v, window, stride, dilation, causal, None, extra_k, extra_v
        )
        results += OPS.fmha_fwd(q.flatten(1, -3), k.flatten(1, -3), v.flatten(1, -3))
        if q is given[0]:
            first = results
    for strided, contiguous in zip(first, results, strict=True):
        assert strided.equal(contiguous)


def dense(q, k, v):
    out, lse = sparse_fmha.attention(q * 2, k, v, causal=True, return_lse=True)
    return out + 1, lse


def neighborhood(q, k, v):
    window, stride, _, causal = options(q.shape[1:-2])
    extra = k.flatten(1, -3)[:, :2]
    out, lse = sparse_fmha.neighborhood_attention(
        q * 2,
        k,
        v,
        window,
        stride=stride,
        causal=[bool(c) for c in causal],
        scale=0.25,
        extra_k=extra,
        extra_v=extra + 1,
        return_lse=True,
    )
    return out + 1, lse


@functools.cache
def inductor_works():
    """Whether there is a C++ compiler and what else inductor needs."""
    try:
        return torch.compile(lambda x: x.sin() + 1)(torch.ones(4)) is not None
    except Exception:  # whatever it lacks
        return False


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("function", "grid"), [(dense, (17,)), (neighborhood, (17,)), (neighborhood, (6, 7))]
)
def test_compile(randn, function, grid, backend):
    """One graph without a break, at one shape and then at another."""
    if backend == "inductor" and not inductor_works():
        pytest.skip("inductor does not work here")
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for lengths in (grid, tuple(n + 3 for n in grid)):
        q, k, v = tensors(randn, lengths, 4, 2, 16)
        for result, expected in zip(compiled(q, k, v), function(q, k, v), strict=True):
            torch.testing.assert_close(result, expected)
            assert result.stride() == expected.stride()


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(randn, dtype, given):
    """Autocast is a cast of each tensor, before; mixed dtypes become one."""
    q, k, v, extra_k, extra_v = tensors(randn, (6, 7), 4, 2, 16, extra=3)
    q = q.to(given)
    more = {"extra_k": extra_k, "extra_v": extra_v, "return_lse": True}
    cast = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in more.items()}
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    with torch.autocast("cpu", dtype=dtype):
        results = sparse_fmha.neighborhood_attention(q, k, v, 3, **more)
        results += sparse_fmha.attention(*flat, return_lse=True)
    expected = sparse_fmha.neighborhood_attention(*(x.to(dtype) for x in (q, k, v)), 3, **cast)
    expected += sparse_fmha.attention(*(x.to(dtype) for x in flat), return_lse=True)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert result.equal(wanted)
    assert results[0].dtype == dtype


def test_autocast_leaves_fp64(randn):
    q, k, v = tensors(randn, (17,), 4, 2, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparse_fmha.attention(q, k, v)
    assert out.equal(sparse_fmha.attention(q, k, v))


@pytest.mark.parametrize(
    ("name", "place"),
    [("attention", i) for i in range(3)] + [("neighborhood_attention", i) for i in range(5)],
)
def test_the_forward_of_what_requires_a_gradient(randn, name, place):
    """As ever, and recorded where that is asked for."""
    inputs = tensors(randn, (17,), 4, 2, 16, extra=3)
    if name == "attention":
        call = functools.partial(sparse_fmha.attention, *inputs[:3], return_lse=True)
    else:
        extra = dict(zip(("extra_k", "extra_v"), inputs[3:], strict=True))
        call = functools.partial(
            sparse_fmha.neighborhood_attention, *inputs[:3], 5, **extra, return_lse=True
        )
    expected = call()
    inputs[place].requires_grad_()
    results = call()
    for result, wanted in zip(results, expected, strict=True):
        assert result.requires_grad
        assert result.equal(wanted)
    with torch.no_grad():
        assert not call()[0].requires_grad
