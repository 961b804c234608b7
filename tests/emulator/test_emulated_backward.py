"""Backward kernels on the emulator against fp64: every mechanism, key biases, dQ added up."""

from dataclasses import replace

import pytest
import torch
from bias_cases import FORMS, biased
from gradient_cases import CASES, Case, block_lists, plain, stripe_lists, window
from gradient_oracle import gradients
from gradient_rule import ZERO, assert_as_good_as_torch, output_gradients
from poison import poisoned

import sparse_fmha

BF16 = torch.bfloat16
TILES = {
    "dense": Case("fmha", (201,), kv=(170,), heads=4, heads_kv=2),
    "causal": Case("fmha", (201,), plain(causal=True), kv=(170,)),
    "1-D": Case("neighborhood", (291,), window((65,), 3), extra=70),
    "2-D": Case("neighborhood", (13, 17), window((9, 14), (1, 2), causal=(0, 1))),
    "2-D, dilation": Case("neighborhood", (15, 17), window((5, 5), (1, 5), (2, 3)), extra=5),
    "3-D": Case("neighborhood", (4, 7, 9), window((3, 6, 7), (1, 2, 1)), extra=3),
    "blocks 64x64, causal": Case(
        "block_sparse", (200,), block_lists(200, 200, 64, 64, 2, causal=True)
    ),
    "blocks 128x16": Case("block_sparse", (150,), block_lists(150, 150, 128, 16, shown=0.1)),
    "stripes": Case("stripe", (200,), stripe_lists(200, 300, 128), kv=(300,)),
}
SINGLE = ("dense, one key", "1-D, itself alone")  # that a query sees
# The kernel of all gradients takes neighborhoods of 512 keys or more.
WIDE = {
    "dense": TILES["dense"],
    "causal": TILES["causal"],
    "causal, groups": Case(
        "fmha", (200,), plain(causal=True), kv=(330,), heads=8, heads_kv=2, batch=2
    ),
    "causal, rows without keys": Case("fmha", (330,), plain(causal=True), kv=(200,), heads=4),
    "1-D": Case("neighborhood", (557,), window((520,), 7), heads_kv=2),
    "2-D": Case("neighborhood", (24, 25), window((21, 24), (3, 1)), extra=70),
    "2-D, dilation": Case("neighborhood", (2, 525), window((2, 260), 1, (1, 2)), heads=1),
}


def check(case, arguments, by_lse=False, **wanted):
    """Gradients through out, as good as torch's; and through lse as well, near those of fp64."""
    __tracebackhide__ = True
    out, lse = case.forward(arguments)
    dout, dlse = output_gradients(out, lse)
    with poisoned():
        found = case.backward(arguments, out, lse, dout, **wanted)
    assert_as_good_as_torch(case, arguments, found, dout, lse)
    if by_lse:
        found = case.backward(arguments, out, lse, dout, dlse, **wanted)
        exact = gradients(case.mechanism, arguments, dout, dlse)
        for name, gradient in found.items():
            size = exact[name].abs().max().item() + ZERO
            torch.testing.assert_close(
                gradient.double(), exact[name], rtol=2e-2, atol=2e-2 * size, msg=name
            )


@pytest.mark.parametrize("name", [name for name in CASES if name not in SINGLE])
def test_small(arch, name):
    check(CASES[name], CASES[name].arguments(BF16, dim=64), deterministic=True)


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_key(arch, name):
    """Its weight is 1 whatever q and k are: their gradients are rounding."""
    case = CASES[name]
    arguments = case.arguments(BF16, dim=64)
    out, lse = case.forward(arguments)
    found = case.backward(arguments, out, lse, torch.ones_like(out), deterministic=True)
    assert found["q"].abs().max() < 1e-5
    assert found["k"].abs().max() < 1e-5
    queries = arguments["q"][..., 0].numel() // arguments["v"][..., 0].numel()  # of a key
    assert found["v"].eq(queries).all()


@pytest.mark.parametrize("dims", [(64, 40), (40, 64)], ids=str)
@pytest.mark.parametrize("name", [*TILES, "1-D, wide"])
def test_values_of_their_own_head_dim(name, dims):
    """By two kernels and, where there is one, by that of all gradients."""
    dim, value_dim = dims
    case = WIDE["1-D"] if name == "1-D, wide" else TILES[name]
    arguments = case.arguments(BF16, dim=dim, value_dim=value_dim)
    with sparse_fmha.arch_override("sm90"):  # sm80 has no such rows
        check(case, arguments, by_lse=True, deterministic=True)
        out, lse = case.forward(arguments)
        dout, _ = output_gradients(out, lse)
        found = case.backward(arguments, out, lse, dout, deterministic=False)
        assert_as_good_as_torch(case, arguments, found, dout, lse)


@pytest.mark.parametrize("name", TILES)
def test_several_tiles(arch, name):
    check(TILES[name], TILES[name].arguments(BF16, dim=64), by_lse=True, deterministic=True)


@pytest.mark.parametrize("dim", [40, 128])
@pytest.mark.parametrize("name", ["dense", "causal", "2-D", "blocks 64x64, causal", "stripes"])
def test_other_head_dims(arch, name, dim):
    check(TILES[name], TILES[name].arguments(BF16, dim=dim), deterministic=True)


def skip_without_one_kernel(arch, mechanism, dtype, dim):
    """Other calls would take two kernels, and pass."""
    wanted = (arch, "backward_fused", mechanism, dtype)
    dims = [
        row["head_dim"]
        for row in sparse_fmha.kernels()
        if (row["arch"], row["pass"], row["mechanism"], row["dtype"]) == wanted
    ]
    if max(dims, default=0) < dim:
        pytest.skip(f"no row for {wanted}, head_dim={dim}")


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", WIDE)
def test_all_gradients_by_one_kernel(name, dim):
    with sparse_fmha.arch_override("sm90"):
        check(WIDE[name], WIDE[name].arguments(BF16, dim=dim))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["causal, groups", "2-D"])
def test_consumers_in_other_orders(monkeypatch, name, seed):
    """At head dim 128 each writes what the other reads, and one may be ahead of the other."""
    monkeypatch.setenv("SPARSE_FMHA_EMULATOR_SEED", str(seed))
    with sparse_fmha.arch_override("sm90"):
        check(WIDE[name], WIDE[name].arguments(BF16, dim=128))


# Whole tiles alone; ends within tiles, grouped heads; queries without keys; more tiles than one
# block starts with; one token.
SEQUENCES = {
    "dense, whole tiles": Case("fmha", (256,), kv=(256,)),
    "dense": replace(TILES["dense"], batch=2),
    "dense, a negative scale": replace(TILES["dense"], scale=-0.2),
    "dense, one key": Case("fmha", (70,), kv=(1,)),
    "causal": replace(TILES["causal"], heads=4, heads_kv=2),
    "causal, more keys": Case("fmha", (130,), plain(causal=True), kv=(301,)),
    "causal, one query": Case("fmha", (1,), plain(causal=True), kv=(150,)),
    "causal, queries without keys": Case("fmha", (330,), plain(causal=True), kv=(200,)),
}


@pytest.mark.parametrize("dim", [40, 64, 96, 104, 128, 256])
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("arch", ["sm80", "sm86"])
def test_all_gradients_by_one_kernel_of_mma(arch, name, dim, dtype):
    case = SEQUENCES[name]
    mechanism = name.partition(",")[0]
    skip_without_one_kernel(arch, mechanism, str(dtype).removeprefix("torch."), dim)
    with sparse_fmha.arch_override(arch):
        check(case, case.arguments(dtype, dim=dim), by_lse=dim == 64)


@pytest.mark.parametrize(
    ("arch", "name", "extra"),
    [
        ("sm90", "2-D", 0),
        ("sm90", "2-D", 70),
        ("sm90", "dense", 0),
        ("sm80", "dense", 0),
        ("sm86", "dense", 0),
    ],
)
def test_weights_of_keys_out_of_range_may_overflow(arch, name, extra):
    """These keys read as zero; here their scores are far above those of all keys in range."""
    case = replace(WIDE[name], extra=extra, heads=1, heads_kv=1)
    skip_without_one_kernel(arch, "dense" if name == "dense" else "neighborhood", "bfloat16", 64)
    arguments = case.arguments(BF16, dim=64)
    arguments["q"][..., 0] = 16
    for name in {"k", "extra_k"} & set(arguments):
        arguments[name][..., 0] = -96
    with sparse_fmha.arch_override(arch):
        out, lse = case.forward(arguments)
        assert lse.max() < -100
        dout, _ = output_gradients(out, lse)
        with poisoned():
            found = case.backward(arguments, out, lse, dout)
    exact = gradients(case.mechanism, arguments, dout, None)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        # In the first channel of q and k sums cancel, so it holds little but rounding.
        ours, wanted = gradient[..., 1:].double(), exact[name][..., 1:]
        size = wanted.abs().max().item()
        torch.testing.assert_close(ours, wanted, rtol=3e-2, atol=2e-2 * size, msg=name)


@pytest.mark.parametrize("name", TILES)
def test_key_bias(name):
    with sparse_fmha.arch_override("sm90"):  # sm80 has no such rows
        form = FORMS[list(TILES).index(name) % len(FORMS)]
        check(*biased(TILES[name], form, BF16, dim=64), by_lse=True)


@pytest.mark.parametrize("name", ["dense", "2-D", "blocks 64x64, causal"])
def test_keys_that_a_bias_hides_have_no_gradients(name):
    case, arguments = biased(replace(TILES[name], extra=0), "one head", BF16, hidden=0, dim=64)
    bias = arguments["key_bias"]
    bias[0, :, : bias.shape[2] // 2 + 7] = -torch.inf
    bias[1] = -torch.inf
    with sparse_fmha.arch_override("sm90"):
        check(case, arguments)
        out, lse = case.forward(arguments)
        found = case.backward(arguments, out, lse, output_gradients(out, lse)[0])
    hidden = bias[:, 0] == -torch.inf
    for of in "kv":
        assert found[of].flatten(1, -3)[hidden].eq(0).all()
    assert found["key_bias"][:, 0][hidden].eq(0).all()
    assert found["q"][1].eq(0).all()


def test_training_through_a_public_function(arch):
    """A neighborhood through autograd, with groups of heads and a sink."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 11, 12, h, 64, generator=generator) for h in (4, 2, 2))
    sink = torch.randn(4, generator=generator)

    def found(*given):
        own = [x.detach().requires_grad_() for x in given]
        out = sparse_fmha.neighborhood_attention(*own[:3], (5, 7), sink=own[3])
        return torch.autograd.grad(out.float().square().sum(), own)

    ours = found(*(x.to(BF16) for x in (q, k, v)), sink)
    mask = sparse_fmha.reference.neighborhood_mask((11, 12), (5, 7))
    own = [x.to(BF16).double().requires_grad_() for x in (q, k, v)] + [
        sink.double().requires_grad_()
    ]
    flat = [x.flatten(1, 2) for x in own[:3]]
    wide = [flat[0], *(x.repeat_interleave(2, 2) for x in flat[1:])]
    scores = torch.einsum("bihd,bjhd->bhij", *wide[:2]) / 8
    scores = scores.masked_fill(~mask, -torch.inf)
    column = own[3][None, :, None, None].expand(1, 4, 132, 1)
    weights = torch.cat([scores, column], 3).softmax(3)[..., :132]
    out = torch.einsum("bhij,bjhd->bihd", weights, wide[2])
    for gradient, exact in zip(ours, torch.autograd.grad(out.square().sum(), own), strict=True):
        size = exact.abs().max().item()
        torch.testing.assert_close(gradient.double(), exact, rtol=5e-2, atol=2e-2 * size)


def test_large_biases_of_all_keys():
    """They cancel, but not in the rows of the last query tile that the tensor does not have."""
    case, arguments = biased(TILES["dense"], "batch, heads", BF16, hidden=0, dim=64)
    arguments["key_bias"] += 150
    with sparse_fmha.arch_override("sm90"):
        check(case, arguments)
