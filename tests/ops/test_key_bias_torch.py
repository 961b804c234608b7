"""A bias of keys under torch's transforms and in the public functions, and what raises."""

import pytest
import torch
from bias_cases import BY_MECHANISM, biased
from full_masks import stripe
from gradient_cases import CASES, values
from gradient_oracle import GRADIENTS

import sparse_fmha
from sparse_fmha import _C, explain

OPS = torch.ops.sparse_fmha
INF = float("inf")
mechanisms = pytest.mark.parametrize("name", BY_MECHANISM.values(), ids=BY_MECHANISM)


@mechanisms
def test_opcheck(name):
    case, arguments = biased(CASES[name], "one batch entry", torch.float32)
    op = getattr(OPS, f"{case.mechanism}_fwd")
    with torch.no_grad():
        out, lse = case.forward(arguments)
    own = {n: arguments[n].clone().requires_grad_() for n in GRADIENTS if n in arguments}
    torch.library.opcheck(op, (), arguments | own)
    given = {"dout": torch.randn_like(out), "dlse": None, **arguments, "out": out, "lse": lse}
    torch.library.opcheck(getattr(OPS, f"{case.mechanism}_bwd"), (), given)


@pytest.mark.parametrize("batch", [1, 2])
@mechanisms
def test_vmap_and_its_gradient(name, batch):
    """Over the bias alone, and over the queries with one bias for all."""
    case, arguments = biased(CASES[name], "one for all" if batch == 1 else "one head")
    bias = arguments["key_bias"]
    biases = torch.stack([bias, bias + 1, bias * 2])

    def total(bias, q):
        out, lse = case.forward({**arguments, "key_bias": bias, "q": q})
        return out.sin().sum() + lse.masked_fill(lse == -INF, 0).sum()

    of_bias = torch.func.grad(total)
    q = arguments["q"]
    found = torch.vmap(of_bias, (0, None))(biases, q)
    torch.testing.assert_close(found, torch.stack([of_bias(x, q) for x in biases]))
    queries = torch.stack([q, q * 2])
    found = torch.vmap(of_bias, (None, 0))(bias, queries)
    torch.testing.assert_close(found, torch.stack([of_bias(bias, x) for x in queries]))


FUNCTIONS = {
    "dense": lambda q, k, v, **o: sparse_fmha.attention(q, k, v, causal=True, **o),
    "neighborhood": lambda q, k, v, **o: sparse_fmha.neighborhood_attention(
        q, k, v, k.shape[1], causal=True, **o
    ),
    "stripes": stripe,
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def tensors(length=70, dtype=torch.float32):
    return [
        values(2, length, h, 8, seed=h, dtype=dtype, device="cpu").requires_grad_()
        for h in (4, 2, 2)
    ]


def a_bias(length=70, heads=4):
    return values(1, heads, length, seed=9, dtype=torch.float32, device="cpu").requires_grad_()


@functions
def test_functions_compiled_in_one_graph(function):
    torch.compiler.reset()

    def loss(*tensors):
        out, lse = function(*tensors[:3], key_bias=tensors[3], return_lse=True)
        return out.square().sum() + lse.sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (70, 131):
        given = [*tensors(length), a_bias(length)]
        expected = torch.autograd.grad(loss(*given), given)
        for a, b in zip(torch.autograd.grad(compiled(*given), given), expected, strict=True):
            torch.testing.assert_close(a, b)


@functions
def test_autocast_leaves_the_bias_in_fp32(function):
    q, k, v = tensors()
    bias = a_bias()
    with torch.autocast("cpu", torch.bfloat16):
        out = function(q, k, v, key_bias=bias)
    expected = function(*(x.bfloat16() for x in (q, k, v)), key_bias=bias)
    assert out.dtype == torch.bfloat16
    assert out.equal(expected)


def test_biases_of_grids():
    q, k, v = (values(2, 5, 6, h, 8, seed=h, dtype=torch.float32, device="cpu") for h in (4, 2, 2))
    bias = values(2, 1, 5, 6, seed=3, dtype=torch.float32, device="cpu").requires_grad_()
    out = sparse_fmha.neighborhood_attention(q, k, v, 3, key_bias=bias)
    flat = sparse_fmha.neighborhood_attention(q, k, v, 3, key_bias=bias.flatten(2))
    assert out.equal(flat)
    (found,) = torch.autograd.grad(out.square().sum(), [bias])
    assert found.shape == bias.shape
    assert found.ne(0).any()


BAD = {
    "a list": (lambda b: [1.0], TypeError, "key_bias must be a tensor, got list"),
    "half": (
        lambda b: b.half(),
        TypeError,
        r"key_bias must have dtype torch\.float32, got torch\.float16",
    ),
    "batch": (
        lambda b: b.expand(3, -1, -1),
        ValueError,
        r"key_bias must have shape .* 70\], .* got \[3, 4, 70\]",
    ),
    "heads": (
        lambda b: b[:, :2],
        ValueError,
        r"key_bias must have shape .* 70\], .* got \[1, 2, 70\]",
    ),
    "tokens": (
        lambda b: b[..., :5],
        ValueError,
        r"key_bias must have shape .* 70\], .* got \[1, 4, 5\]",
    ),
    "more axes": (
        lambda b: b.unflatten(2, (7, 10)),
        ValueError,
        r"key_bias must have shape .* 70\], .* got \[1, 4, 7, 10\]",
    ),
    "a last axis of 1": (
        lambda b: b[..., None],
        ValueError,
        r"key_bias must have shape .* 70\], .* got \[1, 4, 70, 1\]",
    ),
    "rank": (lambda b: b[0], ValueError, r"key_bias must have shape .* 70\], .* got \[4, 70\]"),
    "meta": (lambda b: b.to("meta"), ValueError, "key_bias must be on q's device, cpu, got meta"),
}


@pytest.mark.parametrize("bad", BAD)
@functions
def test_bad_biases_are_named(function, bad):
    change, kind, message = BAD[bad]
    with pytest.raises(kind, match=message):
        function(*tensors(), key_bias=change(a_bias().detach()))


@pytest.mark.parametrize("shape", [(6, 4), (3, 8), (24, 1), (1, 24), (2, 2, 6), (1, 4, 6)])
def test_other_grids_with_as_many_tokens_are_named(shape):
    q = torch.randn(2, 4, 6, 4, 8)
    message = rf"key_bias must have shape .* 4, 6\], .* got \[2, 1, {', '.join(map(str, shape))}\]"
    with pytest.raises(ValueError, match=message):
        sparse_fmha.neighborhood_attention(q, q, q, 3, key_bias=torch.zeros(2, 1, *shape))


def test_raw_ops_name_bad_biases():
    q, k, v = (x.detach() for x in tensors())
    for bias, message in (
        (torch.zeros(1, 1, 70).double(), "key_bias must have dtype float32, got Double"),
        (torch.zeros(1, 1, 69), r"key_bias must have shape \[2 or 1, 4 or 1, 70\], batch"),
        (torch.zeros(3, 1, 70), "key_bias must have 1 or q's 2 in its batch dimension, got 3"),
        (torch.zeros(1, 2, 70), "key_bias must have 1 or q's 4 in its head dimension, got 2"),
    ):
        with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
            OPS.fmha_fwd(q, k, v, key_bias=bias)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", ["forward", "backward_dq", "backward_dkv"])
def test_rows_of_gpus_take_a_bias_or_none(name, skips):
    """Those of the CPU and of backward passes take both."""
    key = {"mechanism": "dense", "dtype": "float16", "head_dim": 64, "pass": name, "skips": skips}
    built = sparse_fmha.build_info()["archs"]
    if not skips or name == "forward":
        of_cpu = _C.find_kernel(arch="cpu", **key)
        assert _C.find_kernel(arch="cpu", **key, key_bias=True) == of_cpu
    if not skips and "90a" in built:
        found = _C.find_kernel(arch="sm90", **key, key_bias=True)["name"]
        without = _C.find_kernel(arch="sm90", **key)["name"]
        if name == "forward":
            assert (found, without) == ("sm90_dense_float16_d64_bias", "sm90_dense_float16_d64")
        else:
            assert found == without == f"sm90_{name}_dense_float16_d64"
        return
    with pytest.raises(RuntimeError, match=r"sparse_fmha: no kernel for arch=sm90,.*with key_bias"):
        _C.find_kernel(arch="sm90", **key, key_bias=True)


def test_explained():
    q = torch.empty(1, 70, 4, 8, device="meta", dtype=torch.float16)
    bias = torch.empty(1, 1, 70, device="meta")
    found = explain(sparse_fmha.attention, q, q, q, key_bias=bias, arch="cpu")
    assert found.kernel == "cpu_dense_float16"
    on_hopper = {"arch": "sm90", "skip_threshold": 0.1, "key_bias": bias}
    found = explain(sparse_fmha.attention, q, q, q, **on_hopper)
    assert found.kernel is None
    assert "the call raises" in found.why
    others = {"takes no key_bias or softcap", "is for bfloat16, q is float16"}
    assert set(found.rejected.values()) <= others
    if "90a" in sparse_fmha.build_info()["archs"]:
        del on_hopper["skip_threshold"]
        found = explain(sparse_fmha.attention, q, q, q, **on_hopper)
        assert found.kernel == "sm90_dense_float16_d64_bias"
        assert found.rejected["sm90_dense_float16_d64"] == "takes no key_bias or softcap"
        found = explain(sparse_fmha.attention, q, q, q, arch="sm90")
        assert found.kernel == "sm90_dense_float16_d64_q64"
        why = "is for calls with key_bias or softcap"
        assert found.rejected["sm90_dense_float16_d64_bias"] == why
    with pytest.raises(
        ValueError, match=r"key_bias must have shape \[1 or 1, 4 or 1, 70\], batch, query heads and"
    ):
        explain(sparse_fmha.attention, q, q, q, key_bias=bias[..., 1:], arch="sm90")
