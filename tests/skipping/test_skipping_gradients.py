"""Gradients of calls that skip; skip_cases.check holds those of every mechanism to fp64."""

from dataclasses import replace

import pytest
import torch
from gradient_cases import LARGE
from skip_cases import cotangents, inputs

import sparse_fmha

# Keys that outweigh the others, which are skipped once these have been visited.
HIGH = {
    "causal": lambda key: key >= 200,
    "1-D": lambda key: key % 400 < 200,  # as do its extra tokens
    "blocks 64x64, causal": lambda key: key < 128,
    "blocks 128x128": lambda key: key // 128 % 2 == 0,
    "stripes, causal": lambda key: (key >= 3) & (key < 67),
}
mechanisms = pytest.mark.parametrize("name", HIGH)


def skipping(name, dtype=torch.float64):
    """A case with two batch entries and its arguments."""
    case = replace(LARGE[name], batch=2)
    arguments = case.arguments(dtype, dim=24)
    arguments["q"][..., 0] = 4
    keys = arguments["k"].flatten(1, -3)
    keys[..., 0] = 8 * HIGH[name](torch.arange(keys.shape[1])).to(dtype)[:, None]
    arguments["k"] = keys.reshape(arguments["k"].shape)
    if case.extra:
        arguments["extra_k"][..., 0] = 8
    return case, arguments | {"scale": 0.5, "skip_threshold": torch.full((2,), 0.05)}


def differentiated(case, arguments, **wanted):
    out, lse, tiles = case.forward(arguments)
    assert 0 < tiles[..., 1].sum() < tiles[..., 0].sum()
    return case.backward(arguments, out, lse, *cotangents(out, lse), **wanted)


@mechanisms
def test_a_bias_is_one_more_dimension_of_q_and_k(name):
    """And so is its gradient, which is that of the keys there."""
    case, arguments = skipping(name)
    arguments = {n: x for n, x in arguments.items() if not n.startswith("extra")}
    groups = case.heads // case.heads_kv
    arguments |= {n: arguments[n].repeat_interleave(groups, -2) for n in "kv"}
    tokens = arguments["k"].shape[1:-2].numel()
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(2, case.heads, tokens, generator=generator)
    out, lse, _ = case.forward(arguments | {"key_bias": bias})
    by = cotangents(out, lse)
    found = case.backward(arguments | {"key_bias": bias}, out, lse, *by)
    wider = {n: torch.nn.functional.pad(arguments[n], (0, 8)) for n in "qkv"}
    wider["q"][..., 24] = 1
    wider["k"].flatten(1, -3)[..., 24] = bias.transpose(1, 2) / 0.5
    out, dout = (torch.nn.functional.pad(x, (0, 8)) for x in (out, by[0]))
    expected = case.backward(arguments | wider, out, lse, dout, by[1])
    for n in "qkv":
        torch.testing.assert_close(found[n], expected[n][..., :24], rtol=1e-6, atol=1e-7)
    of_bias = expected["k"].flatten(1, -3)[..., 24].transpose(1, 2) / 0.5
    torch.testing.assert_close(found["key_bias"].double(), of_bias, rtol=1e-4, atol=1e-5)


@mechanisms
def test_only_what_is_wanted(name):
    case, arguments = skipping(name, torch.float32)
    whole = differentiated(case, arguments)
    for wanted, names in (("need_dq", "q"), ("need_dkv", "kv")):
        flags = {"need_dq": False, "need_dkv": False, wanted: True}
        found = differentiated(case, arguments, **flags)
        for n in "qkv":
            assert found[n].equal(whole[n]) if n in names else found[n].numel() == 0


@mechanisms
def test_any_number_of_threads(name):
    case, arguments = skipping(name, torch.float32)
    expected, threads = differentiated(case, arguments), torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found = differentiated(case, arguments)
            assert all(found[n].equal(expected[n]) for n in expected)
    finally:
        torch.set_num_threads(threads)


@mechanisms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_are_those_of_the_dtype(name, dtype):
    """Nothing is near the threshold here: the same tiles as in fp64 of the same numbers."""
    case, arguments = skipping(name, dtype)
    found = differentiated(case, arguments)
    wide = {
        n: x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype else x
        for n, x in arguments.items()
    } | {"skip_threshold": arguments["skip_threshold"]}
    out, lse, tiles = case.forward(wide)
    assert tiles.equal(case.forward(arguments)[2])
    dout, dlse = cotangents(out.to(dtype), lse)
    for n, exact in case.backward(wide, out, lse, dout.double(), dlse).items():
        error = (found[n] - exact).abs().max()
        allowed = (4 * torch.finfo(dtype).eps + 4e-6) * exact.abs().max() + 2e-5
        assert error <= allowed, n


def test_a_threshold_for_each_batch_entry():
    q, k, v = (x.requires_grad_() for x in inputs(batch=3))
    given = torch.tensor([0.0, 0.01, 0.5])
    out, lse = sparse_fmha.attention(q, k, v, skip_threshold=given, return_lse=True)
    by = cotangents(out, lse)
    together = torch.autograd.grad((out, lse), (q, k, v), by)
    for b in range(3):
        one = slice(b, b + 1)
        leaves = [x[one].detach().requires_grad_() for x in (q, k, v)]
        options = {"skip_threshold": given[one], "return_lse": True}
        results = sparse_fmha.attention(*leaves, **options)
        alone = torch.autograd.grad(results, leaves, [x[one] for x in by])
        assert all(a.equal(x[one]) for a, x in zip(alone, together, strict=True))


@pytest.mark.parametrize("threshold", [0.1, torch.tensor([0.1, 0.3])], ids=["float", "tensor"])
def test_compiled_in_one_graph(threshold):
    def loss(q, k, v, threshold):
        out, lse = sparse_fmha.attention(q, k, v, skip_threshold=threshold, return_lse=True)
        return out.square().sum() + lse.sin().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tensors = [x.requires_grad_() for x in inputs()]
    expected = torch.autograd.grad(loss(*tensors, threshold), tensors)
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors, threshold), tensors), expected, strict=True
    ):
        torch.testing.assert_close(a, b)
