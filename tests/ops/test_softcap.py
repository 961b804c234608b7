"""Capped scores on the CPU: every mechanism, gradients, transforms, and what raises."""

from dataclasses import replace

import bias_oracle
import pytest
import torch
from bias_cases import BY_MECHANISM, FORMS, biased, differentiated
from full_masks import block_sparse, stripe
from gradient_cases import CASES, LARGE, values
from gradient_oracle import GRADIENTS, attend, gradients
from softcap_cases import BAD
from threshold_cases import LISTS, limited

import sparse_fmha
from sparse_fmha import explain

OPS = torch.ops.sparse_fmha
INF = float("inf")
CAPS = (0.3, 2.0, 30.0)
mechanisms = pytest.mark.parametrize("name", BY_MECHANISM.values(), ids=BY_MECHANISM)


def of(case, place, softcap, dtype=torch.float64, **sizes):
    """A case and its arguments; every other one has a bias of keys, too."""
    if place % 2:
        case, arguments = biased(case, FORMS[place // 2 % 4], dtype, seed=place, **sizes)
    else:
        arguments = case.arguments(dtype, seed=place, **sizes)
    return case, arguments | {"softcap": softcap}


@pytest.mark.parametrize("place", range(len(CASES)), ids=list(CASES))
def test_every_mechanism_in_fp64(place):
    """out and lse, and gradients through both."""
    case, arguments = of(list(CASES.values())[place], place, CAPS[place % 3])
    out, lse, by, found = differentiated(case, arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
    lse = lse.masked_fill(lse == -INF, 0).double()
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-6)
    for name, expected in gradients(case.mechanism, arguments, *by).items():
        rtol, atol = (1e-5, 1e-6) if name == "key_bias" else (1e-9, 1e-10)
        torch.testing.assert_close(found[name].double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", LISTS)
def test_with_thresholds_of_rows(name):
    case, arguments = limited(CASES[name])
    arguments["softcap"] = 1.0
    out, _, by, found = differentiated(case, arguments)
    torch.testing.assert_close(out, attend(case.mechanism, arguments)[0], rtol=1e-10, atol=1e-12)
    for of_name, expected in gradients(case.mechanism, arguments, *by).items():
        torch.testing.assert_close(found[of_name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", range(3), ids=str)
@pytest.mark.parametrize("name", ["dense, more keys", "2-D, dilation", "blocks 128x16", "stripes"])
def test_errors_are_those_of_the_dtype(name, place):
    """Over several tiles; of a gradient relative to its largest entry."""
    dtype = (torch.float16, torch.bfloat16, torch.float32)[place]
    case, arguments = of(LARGE[name], place, CAPS[(place + len(name)) % 3], dtype, dim=24)
    out, lse, by, found = differentiated(case, arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    eps = torch.finfo(dtype).eps
    lse = lse.masked_fill(lse == -INF, 0).double()
    torch.testing.assert_close(lse, exact_lse, rtol=2e-6, atol=1e-5)
    assert (out - exact).abs().max() <= 2 * eps * exact.abs().max() + 1e-5
    for name, expected in gradients(case.mechanism, arguments, *by).items():
        error = (found[name] - expected).abs().max()
        assert error <= 4 * eps * expected.abs().max() + 2e-5, name


@mechanisms
@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-8, 0.7, -25.0])
@pytest.mark.parametrize("softcap", [1e-40, 1e-3, 4.0, 1e6, 1e38])
def test_any_scale_and_cap_in_fp32(name, scale, softcap):
    """A large cap changes nothing, so small scores keep their digits."""
    case = replace(CASES[name], scale=scale)
    arguments = case.arguments(torch.float32) | {"softcap": softcap}
    out, lse = case.forward(arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    lse = lse.masked_fill(lse == -INF, 0).double()
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_scores_in_fp32_have_the_digits_of_fp32():
    """lse of one key is its score."""
    drawn = values(4000, 1, 1, 8, seed=1, dtype=torch.float32, device="cpu")
    q = drawn * 10.0 ** torch.linspace(-6, 2, 4000)[:, None, None, None]
    k = values(1, 1, 1, 8, seed=2, dtype=torch.float32, device="cpu").expand_as(q)
    _, lse = sparse_fmha.attention(q, k, k, scale=1.0, softcap=1.0, return_lse=True)
    exact = (q.double() * k.double()).sum(-1)
    # The product itself has the rounding of its summands.
    summands = (q.double() * k.double()).abs().sum(-1)
    allowed = 1e-6 * (1 - exact.tanh() ** 2) * summands + 4e-7 * exact.tanh().abs()
    assert ((lse.double() - exact.tanh()).abs() <= allowed).all()


@mechanisms
def test_gradcheck(name):
    _, arguments = of(CASES[name], 0, 1.5)
    case = replace(CASES[name])
    names = [n for n in GRADIENTS if n in arguments]

    def function(*tensors):
        return case.forward({**arguments, **dict(zip(names, tensors, strict=True))})[0]

    given = [arguments[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(function, given, fast_mode=True)


@mechanisms
def test_hidden_keys_may_hold_anything(name):
    """NaN in a key of bias -inf, or infinity, reaches nothing."""
    case, arguments = biased(CASES[name], "one for all", torch.float32)
    arguments["softcap"] = 2.0
    hidden = arguments["key_bias"][0, 0] == -INF
    keys, values_of = (arguments[n].flatten(1, -3) for n in "kv")
    values_of[:, hidden] = 0
    keys[:, hidden] = 0
    expected = differentiated(case, arguments)
    for junk in (float("nan"), INF):
        keys[:, hidden] = junk
        found = differentiated(case, arguments)
        assert found[0].equal(expected[0])
        for name_of, gradient in found[3].items():
            assert gradient.equal(expected[3][name_of]), name_of


@mechanisms
def test_skipping_votes_on_capped_scores(name):
    """Scores that differ by less than the threshold allows skip nothing; a wide cap skips."""
    large = {"causal": "causal", "2-D, causal on one axis": "2-D, dilation"}
    large |= {"blocks 64x16": "blocks 128x128", "stripes, causal": "stripes"}
    case = LARGE[large[name]]
    arguments = case.arguments(torch.float32, dim=24) | {"scale": 0.5}
    keys = arguments["k"].flatten(1, -3)
    at = torch.arange(keys.shape[1])
    high = {
        "causal": at >= 200,
        "2-D, dilation": (at >= 330) & (at < 660),
        "blocks 128x128": at // 128 % 2 == 0,
        "stripes": (at >= 3) & (at < 67),
    }[large[name]]
    arguments["q"][..., 0], keys[..., 0] = 1, 80.0 * high[:, None]
    arguments["skip_threshold"] = torch.full((case.batch,), 0.3)
    whole = {n: x for n, x in arguments.items() if n != "skip_threshold"}
    out, lse, tiles = case.forward(arguments | {"softcap": 0.5})
    assert tiles[..., 1].sum() == 0
    expected = case.forward(whole | {"softcap": 0.5})
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
    out, _, tiles = case.forward(arguments | {"softcap": 1e6})
    plain = case.forward(arguments)
    assert tiles[..., 1].sum() > 0
    assert tiles.equal(plain[2])
    torch.testing.assert_close(out, plain[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["causal", "stripes, causal"])
def test_opcheck(name):
    case, arguments = of(CASES[name], 1, 2.0, torch.float32)
    with torch.no_grad():
        out, lse = case.forward(arguments)
    own = {n: arguments[n].clone().requires_grad_() for n in GRADIENTS if n in arguments}
    torch.library.opcheck(getattr(OPS, f"{case.mechanism}_fwd"), (), arguments | own)
    given = {"dout": torch.randn_like(out), "dlse": None, **arguments, "out": out, "lse": lse}
    torch.library.opcheck(getattr(OPS, f"{case.mechanism}_bwd"), (), given)


def varlen(q, k, v, return_lse=False, **options):
    """Each batch entry is a sequence."""
    starts = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
    packed = (x.flatten(0, 1) for x in (q, k, v))
    found = sparse_fmha.varlen_attention(
        *packed, starts, starts, q.shape[1], q.shape[1], causal=True, return_lse=True, **options
    )
    out, lse = (x.unflatten(0, q.shape[:2]) for x in found)
    return (out, lse) if return_lse else out


FUNCTIONS = {
    "dense": lambda q, k, v, **o: sparse_fmha.attention(q, k, v, causal=True, **o),
    "neighborhood": lambda q, k, v, **o: sparse_fmha.neighborhood_attention(
        q, k, v, k.shape[1], causal=True, **o
    ),
    "blocks": block_sparse,
    "stripes": stripe,
    "varlen": varlen,
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def tensors(dtype=torch.float64, length=70):
    return [
        values(2, length, h, 8, seed=h + i, dtype=dtype, device="cpu").requires_grad_()
        for i, h in enumerate((4, 2, 2))
    ]


@functions
@pytest.mark.parametrize("softcap", [2.0, 3, 0, 0.0], ids=str)
def test_functions_with_a_sink(function, softcap):
    """The sink is not capped."""
    given = [*tensors(), values(4, seed=5, dtype=torch.float64, device="cpu").requires_grad_()]
    found = function(*given[:3], sink=given[3], softcap=softcap, return_lse=True)
    mask = sparse_fmha.reference.causal_mask(70, 70)
    expected = bias_oracle.attend(*given[:3], mask, sink=given[3], softcap=softcap)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    by = [values(*x.shape, seed=6, dtype=torch.float64, device="cpu") for x in found]
    ours = torch.autograd.grad(found, given, [by[0], by[1].float()])
    for a, b in zip(ours, torch.autograd.grad(expected, given, by), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["neighborhood", "varlen"])
def test_compiled_in_one_graph_and_mapped(name):
    function = FUNCTIONS[name]

    def loss(q, k, v):
        return function(q, k, v, softcap=2.0).square().sum()

    given = tensors(torch.float32)
    expected = torch.autograd.grad(loss(*given), given)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*given), given), expected, strict=True):
        torch.testing.assert_close(a, b)
    stacked = [torch.stack([x.detach(), 2 * x.detach()]) for x in given]
    found = torch.vmap(torch.func.grad(loss))(*stacked)
    alone = torch.func.grad(loss)(*(x[1] for x in stacked))
    torch.testing.assert_close(found[1], alone)


@pytest.mark.parametrize("bad", BAD)
@functions
def test_bad_caps_are_named(function, bad):
    value, kind, message = BAD[bad]
    with pytest.raises(kind, match=message):
        function(*tensors(), softcap=value)


def test_raw_ops_name_bad_caps():
    q, k, v = (x.detach() for x in tensors())
    for value in (-1.0, INF):
        with pytest.raises(RuntimeError, match="sparse_fmha: softcap must be finite and at least"):
            OPS.fmha_fwd(q, k, v, softcap=value)


def test_explained():
    q = torch.empty(1, 70, 4, 8, device="meta", dtype=torch.float16)
    on_hopper = {"arch": "sm90", "softcap": 5.0}
    assert explain(sparse_fmha.attention, q, q, q, skip_threshold=0.1, **on_hopper).kernel is None
    found = explain(sparse_fmha.attention, q, q, q, **on_hopper)
    if "90a" in sparse_fmha.build_info()["archs"]:
        assert found.kernel == "sm90_dense_float16_d64_bias"
        assert found.fused_kernel is None
    with pytest.raises(ValueError, match="softcap must be at least 0, got -1"):
        explain(sparse_fmha.attention, q, q, q, softcap=-1.0, arch="sm90")
