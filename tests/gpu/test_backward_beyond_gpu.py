"""Gradients of tensors with offsets beyond 2^31 elements; none takes more than 30 GB."""

import pytest
import torch
from gradient_cases import Case, block_lists, plain, stripe_lists, window
from gradient_oracle import gradients
from gradient_rule import output_gradients

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
TOKENS, DIM = 8192, 128
PITCH = 1 << 19  # elements from one token to the next: 2^32 from the first to the last, 8 GiB
ONE = {"heads": 1}
FAR = {
    "dense": Case("fmha", (TOKENS,), **ONE),
    "causal": Case("fmha", (TOKENS,), plain(causal=True), **ONE),
    "1-D": Case("neighborhood", (TOKENS,), window((600,), 16), **ONE),
    "1-D, dilation": Case("neighborhood", (TOKENS,), window((200,), 16, 3, 1), **ONE),
    "2-D": Case("neighborhood", (64, TOKENS // 64), window((24, 25), (1, 5)), **ONE),
    "blocks 128x128": Case(
        "block_sparse", (TOKENS,), block_lists(TOKENS, TOKENS, 128, 128, 1), **ONE
    ),
    "blocks 64x64": Case("block_sparse", (TOKENS,), block_lists(TOKENS, TOKENS, 64, 64, 1), **ONE),
    "stripes": Case("stripe", (TOKENS,), stripe_lists(TOKENS, TOKENS, 128, 1, 0.1), **ONE),
}


@pytest.fixture(autouse=True)
def no_cache():
    yield
    torch.cuda.empty_cache()


def far_apart(buffer, place, x):
    """A copy whose tokens are PITCH apart, beside the others of one buffer."""
    size = x.shape[-1]
    view = buffer.view(*x.shape[:-1], PITCH)[..., place * 1024 :][..., :size]
    return view.copy_(x)


@pytest.mark.parametrize("name", FAR)
def test_strides_beyond_32_bits(cuda, name):
    """q, k, v and dout far apart give the bits of contiguous ones; one kernel of all gradients adds
    dQ up in any order."""
    case = FAR[name]
    arguments = case.arguments(BF16, cuda, DIM)
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    expected = case.backward(arguments, out, lse, dout, dlse, deterministic=True)
    buffer = torch.empty(TOKENS * PITCH, dtype=BF16, device=cuda)
    far = {n: far_apart(buffer, i, arguments[n]) for i, n in enumerate("qkv")}
    given = {**arguments, **far}, out, lse, far_apart(buffer, 3, dout), dlse
    found = case.backward(*given, deterministic=True)
    for n, gradient in expected.items():
        assert gradient.equal(found[n]), n
    assert_close(case.backward(*given), expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_queries_beyond_32_bits(cuda, deterministic):
    """2.2e9 elements of q, dout and dQ. dout is 0 but in a few rows, so that they alone make all
    gradients, as in a call that has no other rows."""
    length, heads, few = 1 << 17, 132, 100
    generator = torch.Generator(cuda).manual_seed(0)
    q = torch.empty(1, length, heads, DIM, dtype=BF16, device=cuda).normal_(generator=generator)
    k, v = (
        torch.randn(1, few, 1, DIM, generator=generator, device=cuda, dtype=torch.float32).to(BF16)
        for _ in range(2)
    )
    rows = torch.tensor([0, 1, 63550, 127099, 127101, length - 1], device=cuda)
    assert q[0, :127101].numel() > 1 << 31
    case = Case("fmha", (length,), kv=(few,), heads=heads)
    arguments = {"q": q, "k": k, "v": v, "scale": None}
    out, lse = case.forward(arguments)
    dout = torch.zeros_like(q)
    dout[:, rows] = torch.randn_like(q[:, rows])
    found = case.backward(arguments, out, lse, dout, deterministic=deterministic)
    some = {**arguments, "q": q[:, rows]}
    expected = gradients("fmha", some, dout[:, rows], None)
    assert found["q"][0].flatten(1).any(1).nonzero().flatten().equal(rows)
    found["q"] = found["q"][:, rows]
    assert_close(found, expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_keys_beyond_32_bits(cuda, deterministic):
    """2.2e9 elements of k, v, dK and dV; each head is attention of its own."""
    length, heads, few = 1 << 17, 132, 100
    generator = torch.Generator(cuda).manual_seed(0)
    k, v = (
        torch.empty(1, length, heads, DIM, dtype=BF16, device=cuda).normal_(generator=generator)
        for _ in range(2)
    )
    assert k.numel() > 1 << 31
    q, dout = (
        torch.randn(1, few, heads, DIM, device=cuda, dtype=torch.float32).to(BF16) for _ in range(2)
    )
    case = Case("fmha", (few,), kv=(length,), heads=heads, heads_kv=heads)
    arguments = {"q": q, "k": k, "v": v, "scale": None}
    out, lse = case.forward(arguments)
    found = case.backward(arguments, out, lse, dout, deterministic=deterministic)
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        own = {n: arguments[n][:, :, one] for n in "qkv"} | {"scale": None}
        expected = gradients("fmha", own, dout[:, :, one], None)
        assert_close({n: x[:, :, one] for n, x in found.items()}, expected)


def assert_close(found, expected):
    for n, exact in expected.items():
        size = exact.abs().max().item()
        error = (found[n].double() - exact.double()).abs()
        assert (error <= 2e-2 * exact.abs() + 1e-2 * size).all(), (n, error.max().item(), size)
