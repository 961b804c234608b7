"""Gradients of every mechanism against fp64 autograd through the reference, and by differences."""

import pytest
import torch
from gradient_cases import CASES, LARGE, values
from gradient_oracle import GRADIENTS, gradients, mask_of

cases = pytest.mark.parametrize("name", CASES)
large = pytest.mark.parametrize("name", LARGE)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def output_gradients(out, lse, seed=7):
    """Gradients of out and lse; 0 of a lse of -inf, which has none."""
    dout = values(*out.shape, seed=seed, dtype=out.dtype, device=out.device)
    dlse = values(*lse.shape, seed=seed + 1, dtype=lse.dtype, device=lse.device)
    return dout, dlse.masked_fill(lse == -torch.inf, 0)


@cases
def test_gradcheck(name):
    """By differences of out; lse is fp32."""
    case = CASES[name]
    arguments = case.arguments()
    of = [n for n in GRADIENTS if n in arguments]
    tensors = [arguments[n].requires_grad_() for n in of]

    def out(*tensors):
        return case.forward({**arguments, **dict(zip(of, tensors, strict=True))})[0]

    torch.autograd.gradcheck(out, tensors, atol=1e-7)


@pytest.mark.parametrize("outputs", ["out", "lse", "both"])
@pytest.mark.parametrize("name", [*CASES, *(f"large {name}" for name in LARGE)])
def test_fp64(name, outputs):
    """To fp64 rounding, of out, of lse and of both together."""
    case = LARGE[name.removeprefix("large ")] if name.startswith("large ") else CASES[name]
    arguments = case.arguments()
    tensors = [arguments[n].requires_grad_() for n in GRADIENTS if n in arguments]
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    given = {"out": [(out, dout)], "lse": [(lse, dlse)], "both": [(out, dout), (lse, dlse)]}
    results, by = zip(*given[outputs], strict=True)
    found = torch.autograd.grad(results, tensors, by)
    expected = gradients(
        case.mechanism,
        arguments,
        dout if outputs != "lse" else None,
        dlse if outputs != "out" else None,
    )
    for gradient, (of, exact) in zip(found, expected.items(), strict=True):
        assert gradient.is_contiguous()
        torch.testing.assert_close(
            gradient, exact, rtol=1e-10, atol=1e-11, msg=lambda text, of=of: f"{of}: {text}"
        )


def eager_gradients(case, arguments, dout):
    """By torch's own attention without fusion, in the dtype of the inputs."""
    own = {n: arguments[n].detach().requires_grad_() for n in GRADIENTS if n in arguments}
    q, k, v = (own[n].flatten(1, -3) for n in "qkv")
    mask = mask_of(case.mechanism, arguments)
    if case.extra:
        k, v = torch.cat([k, own["extra_k"]], 1), torch.cat([v, own["extra_v"]], 1)
        mask = torch.nn.functional.pad(mask, (0, case.extra), value=True)
    mask = mask.expand(case.batch, case.heads, q.shape[1], k.shape[1])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=mask,
            scale=case.scale,
            enable_gqa=True,
        )
    out = out.masked_fill(~mask.any(-1, keepdim=True), 0).transpose(1, 2).reshape(dout.shape)
    found = torch.autograd.grad(out, list(own.values()), dout)
    return {n: x.nan_to_num(0) for n, x in zip(own, found, strict=True)}


@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@large
def test_errors_are_at_most_twice_those_of_torch(name, dtype, dim, poisoned):
    case = LARGE[name]
    arguments = case.arguments(dtype, dim=dim)
    out, lse = case.forward(arguments)
    dout, _ = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout)
    exact = gradients(case.mechanism, arguments, dout, None)
    eager = eager_gradients(case, arguments, dout)
    # Of a lse in fp32, which all weights of its row inherit.
    largest = lse.masked_fill(lse == -torch.inf, 0).abs().max().item()
    rounding = torch.finfo(torch.float32).eps * (1 + largest)
    for of, gradient in found.items():
        assert gradient.dtype == dtype
        assert gradient.isfinite().all(), of
        ours, theirs = ((x[of].double() - exact[of]).abs() for x in (found, eager))
        floor = (torch.finfo(dtype).eps + rounding) * exact[of].abs().max()
        for figure in (torch.max, lambda x: x.square().mean().sqrt()):
            assert figure(ours) <= 2 * figure(theirs) + floor, of


@large
def test_any_number_of_threads_gives_the_same_bits(name):
    case = LARGE[name]
    arguments = case.arguments(torch.float32, dim=40)
    out, lse = case.forward(arguments)
    given = out, lse, *output_gradients(out, lse)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(case.backward(arguments, *given))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for of, gradient in found[0].items():
            assert gradient.equal(other[of]), of


@cases
def test_only_what_is_wanted(name):
    """[B, 0] for the rest, and the same bits."""
    case = CASES[name]
    arguments = case.arguments(torch.float32)
    out, lse = case.forward(arguments)
    given = out, lse, *output_gradients(out, lse)
    whole = case.backward(arguments, *given)
    for dq, dkv in ((True, False), (False, True), (False, False)):
        part = case.backward(arguments, *given, need_dq=dq, need_dkv=dkv)
        for of, gradient in part.items():
            if dq if of == "q" else dkv:
                assert gradient.equal(whole[of])
            else:
                assert gradient.shape == (case.batch, 0)


@pytest.mark.parametrize("name", ["causal", "2-D", "blocks 64x16", "stripes"])
def test_layouts_of_gradients(name):
    """Strides of any kind, also of 0, give the bits of the contiguous copy."""
    case = CASES[name]
    arguments = case.arguments(torch.bfloat16)
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    heads_first = dout.movedim(-2, 1).contiguous().movedim(1, -2)
    columns = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
    gaps = torch.cat([dout, dout], -1)[..., : dout.shape[-1]]
    expanded = [dout[:1, ..., :1, :].expand_as(dout), dout.new_ones(()).expand_as(dout)]
    for strided in (heads_first, columns, gaps, *expanded):
        spread = dlse.transpose(1, -1).contiguous().transpose(1, -1)
        found = case.backward(arguments, out, lse, strided, spread)
        plain = case.backward(arguments, out, lse, strided.contiguous(), dlse)
        for of, gradient in found.items():
            assert gradient.equal(plain[of]), of


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["causal", "1-D", "2-D, dilation", "blocks 64x16", "stripes"])
def test_what_is_not_seen_may_hold_anything(name, dtype, junk):
    """A key that some queries see changes the gradients of nothing else but what meets these."""
    case = CASES[name]
    arguments = case.arguments(dtype)
    mask = mask_of(case.mechanism, arguments)
    mask = mask.expand(case.batch, case.heads, *mask.shape[-2:])
    key = mask.shape[-1] // 2
    sees = mask[..., key]  # [B, Hq, Lq]
    met = (sees[..., None] & mask).any(-2)  # keys that share a query with it, for each head
    spoiled = {n: arguments[n].clone() for n in "kv"}
    for x in spoiled.values():
        x.flatten(1, -3)[:, key] = junk
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    # Of the spoiled problem the rows that see the key are NaN; the others are as they were.
    hit = sees.transpose(1, 2).reshape(lse.shape)
    bad_out = out.masked_fill(hit[..., None], float("nan"))
    bad_lse = lse.masked_fill(hit, float("nan"))
    plain = case.backward(arguments, out, lse, dout, dlse)
    found = case.backward({**arguments, **spoiled}, bad_out, bad_lse, dout, dlse)
    clean = ~sees.transpose(1, 2).reshape(*lse.shape)
    assert clean.any()
    assert found["q"][clean].equal(plain["q"][clean])
    of_group = met.unflatten(1, (case.heads_kv, -1)).any(2)
    clean = ~of_group.transpose(1, 2).reshape(arguments["k"].shape[:-1])
    assert clean.any() == (name in ("1-D", "2-D, dilation", "stripes"))  # else all keys meet
    for n in "kv":
        assert found[n][clean].equal(plain[n][clean])


def test_rows_without_keys_may_have_any_gradient():
    case = CASES["causal, rows without keys"]
    arguments = case.arguments()
    out, lse = case.forward(arguments)
    empty = lse == -torch.inf
    assert empty.any()
    dout, dlse = output_gradients(out, lse)
    expected = case.backward(arguments, out, lse, dout, dlse)
    bad = dout.masked_fill(empty[..., None], float("nan")), dlse.masked_fill(empty, float("nan"))
    found = case.backward(arguments, out, lse, *bad)
    for of, gradient in found.items():
        assert gradient.equal(expected[of]), of
    assert not found["q"][empty].any()


def test_keys_that_nobody_sees_have_none(poisoned):
    for name in ("causal, more keys", "blocks 64x16", "stripes"):
        case = CASES[name]
        arguments = case.arguments(torch.float32)
        for n in ("counts", "partial_counts", "range_counts"):
            if n in arguments:
                arguments[n].zero_()
        if name.startswith("causal"):
            arguments["q"] = arguments["q"][:, :0]
        out, lse = case.forward(arguments)
        with poisoned():
            found = case.backward(arguments, out, lse, *output_gradients(out, lse))
        for of, gradient in found.items():
            assert gradient.shape == arguments[of].shape
            assert not gradient.any()
