"""torch.compile beyond one shape: symbolic sizes, autocast, export, and errors while tracing."""

import pytest
import torch
import torch._dynamo.config

import sparse_fmha


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def attention_layer(x, weight, **options):
    """Projections around attention, so that there is something to trace through."""
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 16)).unbind(-3)
    out, lse = sparse_fmha.attention(q, k, v, return_lse=True, **options)
    return out.flatten(-2) * 2, lse + 1


def grid_layer(x, weight, extra, **options):
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 16)).unbind(-3)
    out, lse = sparse_fmha.neighborhood_attention(
        q, k, v, extra_k=extra, extra_v=extra, return_lse=True, **options
    )
    return out.flatten(-2) * 2, lse + 1


def assert_same(results, expected):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def weight(randn):
    return randn(64, 192, seed=1) / 8


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_serves_all_lengths(randn, weight):
    layer = compiled(attention_layer, dynamic=True)
    for length in (20, 33, 150):
        x = randn(2, length, 64, seed=length)
        expected = attention_layer(x, weight, causal=True, scale=0.3)
        assert_same(layer(x, weight, causal=True, scale=0.3), expected)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_serves_all_grids(randn, weight):
    layer = compiled(grid_layer, dynamic=True)
    extra = randn(2, 3, 4, 16, seed=2)
    options = {"window": (5, 4), "stride": 2, "causal": (False, True)}
    for grid in ((7, 9), (12, 6), (20, 31)):
        x = randn(2, *grid, 64, seed=grid[0])
        assert_same(layer(x, weight, extra, **options), grid_layer(x, weight, extra, **options))


def test_autocast_inside_and_outside(randn, weight):
    x = randn(2, 33, 64)

    def inside(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return attention_layer(x, weight)

    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = attention_layer(x, weight)
        outside, _ = compiled(attention_layer)(x, weight)
    assert outside.dtype == torch.bfloat16
    assert outside.equal(expected)
    assert compiled(inside)(x, weight)[0].equal(expected)


def test_bad_input_is_named_while_tracing(randn):
    q, k = randn(1, 20, 3, 16), randn(1, 20, 2, 16)
    with pytest.raises(Exception, match=r"heads of q must be .* got 3 and 2"):
        compiled(sparse_fmha.attention)(q, k, k)


def test_gradients(randn, weight):
    """Inputs that need gradients make the backward pass be traced too."""
    x = randn(2, 33, 64).requires_grad_()
    grads = [
        torch.autograd.grad(layer(x, weight)[0].square().sum(), x)[0]
        for layer in (attention_layer, compiled(attention_layer))
    ]
    torch.testing.assert_close(*grads)


def test_export(randn):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return sparse_fmha.attention(q, k, v, causal=True)

    tensors = tuple(randn(2, 20, heads, 16, seed=heads) for heads in (4, 2, 2))
    program = torch.export.export(Layer(), tensors)
    assert "sparse_fmha.fmha_fwd" in str(program.graph)
    assert program.module()(*tensors).equal(sparse_fmha.attention(*tensors, causal=True))
