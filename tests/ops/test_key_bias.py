"""A bias of keys on the CPU: every mechanism, its gradient, and what is hidden."""

from dataclasses import replace

import bias_oracle
import pytest
import torch
from bias_cases import BY_MECHANISM, FORMS, biased, differentiated
from gradient_cases import CASES, LARGE, values
from gradient_oracle import attend, gradients, mask_of

import sparse_fmha

OPS = torch.ops.sparse_fmha
INF = float("inf")
mechanisms = pytest.mark.parametrize("name", BY_MECHANISM.values(), ids=BY_MECHANISM)


@pytest.mark.parametrize("place", range(len(CASES)), ids=list(CASES))
def test_every_mechanism_in_fp64(place):
    """out and lse, and gradients through both; the forms take turns."""
    name = list(CASES)[place]
    case, arguments = biased(CASES[name], FORMS[place % 4], seed=place)
    out, lse, by, found = differentiated(case, arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        lse.masked_fill(lse == -INF, 0).double(), exact_lse, rtol=1e-6, atol=1e-6
    )
    for of, expected in gradients(case.mechanism, arguments, *by).items():
        if of == "key_bias":
            assert found[of].dtype == torch.float32
            assert found[of].shape == arguments[of].shape
            torch.testing.assert_close(found[of].double(), expected, rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(found[of], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("place", range(3), ids=str)
@pytest.mark.parametrize("name", ["dense, more keys", "2-D, dilation", "blocks 128x16", "stripes"])
def test_errors_are_those_of_the_dtype(name, place):
    """Over several tiles; of a gradient relative to its largest entry. Forms take turns."""
    dtype = (torch.float16, torch.bfloat16, torch.float32)[place]
    case, arguments = biased(LARGE[name], FORMS[(place + len(name)) % 4], dtype, dim=24)
    out, lse, (dout, dlse), found = differentiated(case, arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        lse.masked_fill(lse == -INF, 0).double(), exact_lse, rtol=2e-6, atol=1e-5
    )
    assert (out - exact).abs().max() <= 2 * eps * exact.abs().max() + 1e-5
    for of, expected in gradients(case.mechanism, arguments, dout, dlse).items():
        error = (found[of] - expected).abs().max()
        assert error <= 4 * eps * expected.abs().max() + 2e-5, of


@mechanisms
@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-8, 0.7, -25.0])
def test_any_scale(name, scale):
    """The bias is added to the scaled score, whatever the scale."""
    case, arguments = biased(replace(CASES[name], scale=scale), "one head", torch.float32)
    out, lse = case.forward(arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        lse.masked_fill(lse == -INF, 0).double(), exact_lse, rtol=1e-5, atol=1e-5
    )


@mechanisms
def test_hidden_keys_may_hold_anything(name):
    """NaN in a key of bias -inf reaches nothing; its gradients are 0."""
    case, arguments = biased(CASES[name], "one for all", torch.float32)
    arguments["key_bias"] = arguments["key_bias"].clone()
    hidden = arguments["key_bias"][0, 0] == -INF
    assert hidden.any()
    for of in "kv":
        own = arguments[of].flatten(1, -3).clone()
        own[:, hidden] = 0
        arguments[of] = own.reshape(arguments[of].shape)
    expected = differentiated(case, arguments)
    keys = arguments["k"].flatten(1, -3).clone()
    keys[:, hidden] = float("nan")
    found = differentiated(case, {**arguments, "k": keys.reshape(arguments["k"].shape)})
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])
    for of, gradient in found[3].items():
        assert gradient.equal(expected[3][of]), of
    assert found[3]["k"].flatten(1, -3)[:, hidden].eq(0).all()
    assert found[3]["key_bias"][..., hidden].eq(0).all()


@mechanisms
def test_rows_whose_keys_are_all_hidden(name):
    case, arguments = biased(CASES[name], "batch, heads", torch.float32)
    if case.extra:
        del arguments["extra_k"], arguments["extra_v"]
    arguments["key_bias"][1] = -INF
    out, lse, _, found = differentiated(case, arguments)
    assert out[1].eq(0).all()
    assert lse[1].eq(-INF).all()
    assert out[0].ne(0).any()
    for of, gradient in found.items():
        assert gradient.isfinite().all(), of
        assert gradient[1].eq(0).all(), of
        assert gradient[0].ne(0).any(), of


@pytest.mark.parametrize("value", [float("nan"), INF])
@mechanisms
def test_nan_and_infinity_make_the_rows_that_see_the_key_nan(name, value):
    case, arguments = biased(CASES[name], "one for all", torch.float32, hidden=0)
    key = 12
    arguments["key_bias"][..., key] = value
    out, lse = case.forward(arguments)
    seen = mask_of(case.mechanism, arguments)[..., key].expand(2, case.heads, -1).transpose(1, 2)
    assert seen.any()
    assert (~seen).any()
    assert out.flatten(1, -3).isnan().all(-1).equal(seen)
    assert lse.flatten(1, -2).isnan().equal(seen)


def test_the_largest_finite_numbers_are_not_infinite():
    """As in torch's softmax, all keys at the lowest number share the weights."""
    q, k, v = (values(1, 9, 2, 8, seed=i, dtype=torch.float32, device="cpu") for i in range(3))
    bias = torch.full((1, 1, 9), torch.finfo(torch.float32).min)
    out = sparse_fmha.attention(q, k, v, key_bias=bias, scale=0.01)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))
    bias[..., 3] = torch.finfo(torch.float32).max
    out = sparse_fmha.attention(q, k, v, key_bias=bias, scale=0.01)
    torch.testing.assert_close(out, v[:, 3:4].expand_as(out))


@mechanisms
@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_skipping_votes_on_biased_scores(name, threshold):
    """The same tiles and results as with the bias as one more dimension of q and k."""
    large = {"causal": "causal", "2-D, causal on one axis": "2-D, dilation"}
    large |= {"blocks 64x16": "blocks 128x128", "stripes, causal": "stripes"}
    case, arguments = biased(LARGE[large[name]], "one batch entry", torch.float32, dim=24)
    arguments = {n: x for n, x in arguments.items() if not n.startswith("extra")}
    bias = arguments["key_bias"].masked_fill(arguments["key_bias"] == -INF, -9)
    key = torch.arange(bias.shape[2])
    high = {
        "causal": key >= 200,
        "2-D, dilation": key // 110 % 2 == 0,
        "blocks 128x128": key // 128 % 2 == 0,
        "stripes": (key >= 3) & (key < 67),
    }[large[name]]
    arguments["key_bias"] = bias + 40 * high
    arguments |= {"scale": 0.5, "skip_threshold": torch.full((2,), threshold)}
    arguments["k"] = arguments["k"].repeat_interleave(case.heads // arguments["k"].shape[-2], -2)
    arguments["v"] = arguments["v"].repeat_interleave(case.heads // arguments["v"].shape[-2], -2)
    out, lse, tiles = case.forward(arguments)
    wider = {n: torch.nn.functional.pad(arguments[n], (0, 8)) for n in "qkv"}
    wider["q"][..., 24] = 1
    of_keys = arguments["key_bias"].expand(2, case.heads, -1).transpose(1, 2)
    wider["k"].flatten(1, -3)[..., 24] = of_keys / 0.5
    plain = {n: x for n, x in arguments.items() if n != "key_bias"}
    expected = case.forward(plain | wider)
    assert tiles.equal(expected[2])
    assert 0 < tiles[..., 1].sum() < tiles[..., 0].sum()
    torch.testing.assert_close(out, expected[0][..., :24], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)


@mechanisms
def test_layouts_and_threads(name):
    """Strides of any kind give the bits of the contiguous copy, as does any number of threads."""
    case, arguments = biased(CASES[name], "batch, heads", torch.float32)
    bias = arguments["key_bias"]
    *_, found = differentiated(case, arguments)
    gaps = torch.stack([bias, bias], 3)[..., 0]
    heads_last = bias.transpose(1, 2).contiguous().transpose(1, 2)
    shifted = torch.cat([bias.flatten(), bias.flatten()])[1:][: bias.numel()].view(bias.shape)
    for strided in (gaps, heads_last, bias[:, :1].expand_as(bias), shifted):
        own = differentiated(case, {**arguments, "key_bias": strided})
        plain = differentiated(case, {**arguments, "key_bias": strided.contiguous().clone()})
        assert own[0].equal(plain[0])
        assert own[3]["key_bias"].equal(plain[3]["key_bias"])
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            *_, again = differentiated(case, arguments)
            assert all(again[of].equal(found[of]) for of in found)
    finally:
        torch.set_num_threads(threads)


@mechanisms
def test_only_what_is_wanted(name):
    """A gradient of the bias alone, and none of it; the same bits as all of them."""
    case, arguments = biased(CASES[name], "one head", torch.float32)
    out, lse, (dout, dlse), whole = differentiated(case, arguments)
    bias = arguments["key_bias"].detach().requires_grad_()
    results = case.forward({**arguments, "key_bias": bias})
    (alone,) = torch.autograd.grad(results, [bias], (dout, dlse))
    assert alone.equal(whole["key_bias"])
    op = getattr(OPS, f"{case.mechanism}_bwd")
    given = {**arguments, "dout": dout, "dlse": dlse, "out": out, "lse": lse}
    *others, of_bias = op(**given, need_dbias=False)
    assert of_bias.shape == (2, 0)
    assert others[1].equal(whole["k"])
    *others, of_bias = op(**given, need_dq=False, need_dkv=False)
    assert [x.shape for x in others] == [(2, 0)] * len(others)
    assert of_bias.shape == (2, case.heads, bias.shape[2])


def test_the_oracle_is_attention_under_a_mask():
    """Without a bias or a sink, and with a bias in one more dimension of q and k."""
    q, k, v = (values(2, 70, h, 8, seed=h, dtype=torch.float64, device="cpu") for h in (4, 2, 2))
    mask = sparse_fmha.reference.causal_mask(70, 70)
    expected = sparse_fmha.reference.attention(q, k, v, mask)
    for a, b in zip(bias_oracle.attend(q, k, v, mask), expected, strict=True):
        torch.testing.assert_close(a, b)
    bias = values(1, 1, 70, seed=9, dtype=torch.float32, device="cpu")
    wider = [torch.nn.functional.pad(x, (0, 1), value=1) for x in (q, k)]
    wider[1][..., 8] = 4 * bias[0, 0, :, None]
    expected = sparse_fmha.reference.attention(*wider, wider[1], mask, 0.25)
    out, lse = bias_oracle.attend(q, k, wider[1], mask, 0.25, bias)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
