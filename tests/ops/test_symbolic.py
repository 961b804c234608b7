"""Windows, scales and thresholds that change: one graph serves all their values."""

import io
import math

import pytest
import torch
import torch._dynamo.config
import torch.fx.experimental._config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_fmha import (
    BlockGrid,
    StripeMask,
    attention,
    block_sparse_attention,
    neighborhood_attention,
    patterns,
    stripe_attention,
)

OPS = torch.ops.sparse_fmha
LENGTHS = 100, 160, 300


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tokens(length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(1, length, 2, 16, generator=generator, dtype=dtype)


def dense(q, **options):
    return attention(q, q, q, causal=True, **options)


def windows(q, window=9, **options):
    return neighborhood_attention(q, q, q, window, **options)


def blocks(q, **options):
    grid = BlockGrid.of(q, q, 64, 64, causal=True)
    mask = grid.mask(grid.sink(64) | grid.local(q.shape[1] // 2))
    return block_sparse_attention(q, q, q, mask, **options)


def stripes(q, **options):
    length = q.shape[1]
    seen = (torch.arange(length) % 3 == 0).expand(1, 1, -(-length // 64), length)
    mask = StripeMask.from_columns(seen, length, 64, causal=True, width=120)
    return stripe_attention(q, q, q, mask, **options)


def anchors(q, **options):
    return patterns.anchor_attention(q, q, q, step=1, block=64, width=60, **options).out


def grid_windows(q, window, **options):
    """On a grid of rows of ten."""
    q = q.unflatten(1, (-1, 10))
    return neighborhood_attention(q, q, q, window, **options).flatten(1, 2)


MECHANISMS = {"dense": dense, "windows": windows, "blocks": blocks, "stripes": stripes}
INTS, FLOATS = (4, 5, 9), (0.1, 0.25, 0.7)
# Functions of tokens and a number, and values of the number.
OF_NUMBERS = {
    "window": (windows, INTS),
    "window of one axis": (lambda q, n: grid_windows(q, (n, 3)), INTS),
    "stride": (lambda q, n: windows(q, 9, stride=n), INTS),
    "stride of one axis": (lambda q, n: grid_windows(q, 9, stride=(n, 2)), INTS),
    "dilation": (lambda q, n: windows(q, 9, dilation=n), INTS),
    "window, stride, scale": (lambda q, n: windows(q, 2 * n, stride=n, scale=1 / n), INTS),
    "window that skips": (lambda q, n: windows(q, n, skip_threshold=0.2), INTS),
    "scale that is an int": (lambda q, n: dense(q, scale=n), INTS),
    "scale that is computed": (lambda q, x: dense(q, scale=2 * x - 1), FLOATS),
    "scale of AnchorAttention": (lambda q, x: anchors(q, scale=x), FLOATS),
}
# Functions of tokens alone, with numbers that come from their length.
OF_LENGTHS = {
    "window": lambda q: windows(q, q.shape[1] // 4),
    "window, stride, dilation": lambda q: windows(
        q, q.shape[1] // 8, stride=q.shape[1] // 16, dilation=2, scale=q.shape[1] ** -0.5
    ),
    "window of one axis": lambda q: grid_windows(q, (q.shape[1] // 20, 3)),
    "window that skips": lambda q: windows(q, q.shape[1] // 4, skip_threshold=1 / q.shape[1]),
}


def with_scale(attend):
    return lambda q, x: attend(q, scale=x)


def with_threshold(attend):
    return lambda q, x: attend(q, skip_threshold=x)


def with_both(attend):
    return lambda q, x: attend(q, scale=x, skip_threshold=abs(x) / 2)


def of_length(function):
    return lambda q: function(q, q.shape[1] ** -0.5)


for name, attend in MECHANISMS.items():
    OF_NUMBERS[f"scale of {name}"] = with_scale(attend), (-0.3, *FLOATS)
    OF_NUMBERS[f"threshold of {name}"] = with_threshold(attend), FLOATS
    OF_NUMBERS[f"both of {name}"] = with_both(attend), (-0.3, *FLOATS)
    OF_LENGTHS[f"scale of {name}"] = of_length(with_scale(attend))
    OF_LENGTHS[f"threshold of {name}"] = of_length(with_threshold(attend))
of_lengths = pytest.mark.parametrize("function", OF_LENGTHS.values(), ids=OF_LENGTHS)


@pytest.mark.parametrize("name", OF_NUMBERS)
@torch._dynamo.config.patch(error_on_recompile=True)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # numbers may be equal by chance
def test_one_graph_serves_all_values(name):
    if name == "scale that is computed" and torch.__version__ < "2.12":
        pytest.skip("torch 2.10 and 2.11 take sums with floats for constants")
    function, values = OF_NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for value in values:
        q = tokens(100)
        torch.testing.assert_close(compiled(q, value), function(q, value))


@pytest.mark.parametrize("name", ["window", "scale of dense", "threshold of dense"])
def test_a_value_that_changes_becomes_a_variable(name):
    """By default torch.compile takes the first value for a constant, and the second for one."""
    function, values = OF_NUMBERS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    q = tokens(100)
    counts = []
    for value in values:
        torch.testing.assert_close(compiled(q, value), function(q, value))
        counts.append(counter.frame_count)
    assert counts[0] == 1
    assert len(set(counts[1:])) == 1


@of_lengths
@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_serves_all_lengths(function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in LENGTHS:
        q = tokens(length)
        torch._dynamo.mark_dynamic(q, 1)
        torch.testing.assert_close(compiled(q), function(q))


exported = [(name, False) for name in OF_LENGTHS] + [("window, stride, dilation", True)]


@pytest.mark.parametrize(("name", "strict"), exported)
def test_an_exported_program_takes_all_lengths(name, strict):
    function = OF_LENGTHS[name]

    class Layer(torch.nn.Module):
        def forward(self, q):
            return function(q)

    file = io.BytesIO()
    shapes = ({1: Dim.DYNAMIC},)
    program = torch.export.export(Layer(), (tokens(160),), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for length in LENGTHS:
        torch.testing.assert_close(module(tokens(length)), function(tokens(length)))


@of_lengths
def test_make_fx(function):
    graph = make_fx(function, tracing_mode="symbolic")(tokens(160))
    for length in LENGTHS:
        torch.testing.assert_close(graph(tokens(length)), function(tokens(length)))


@pytest.mark.parametrize("name", ["window, stride, scale", "both of blocks", "scale of stripes"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_inductor(name):
    function, values = OF_NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for value in values:
        torch.testing.assert_close(compiled(tokens(100), value), function(tokens(100), value))


def test_numbers_that_do_not_change_stay_constants():
    def function(q):
        return windows(q, 9, stride=2, scale=0.3) + dense(q, scale=2)

    graphs = []
    compiled = torch.compile(function, backend=lambda graph, _: graphs.append(graph) or graph)
    compiled(tokens(100))
    assert len(graphs) == 1
    assert "neighborhood_fwd(" in graphs[0].code
    assert "fmha_fwd(" in graphs[0].code
    assert "symbolic" not in graphs[0].code


def test_values_that_are_not_allowed_are_refused():
    bad = {
        "window": (r"window\[0\]", 0),
        "scale of dense": ("scale", math.inf),
        "threshold of dense": ("skip_threshold", 1.5),
    }
    for name, (refused, value) in bad.items():
        function, values = OF_NUMBERS[name]
        compiled = torch.compile(function, backend="aot_eager", dynamic=True)
        compiled(tokens(100), values[0])
        with pytest.raises((ValueError, RuntimeError), match=f"{refused} must be .*, got {value}"):
            compiled(tokens(100), value)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_autocast():
    def function(q, scale):
        with torch.autocast("cpu", torch.bfloat16):
            return dense(q, scale=scale)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for scale in FLOATS:
        found = compiled(tokens(100), scale)
        assert found.dtype == torch.bfloat16
        assert found.equal(function(tokens(100), scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck(dtype):
    q = tokens(100, dtype)
    scale = torch.tensor(0.3, dtype=torch.float64)
    threshold = torch.tensor([0.1])
    torch.library.opcheck(OPS.fmha_fwd_symbolic, (q, q, q, True, scale))
    torch.library.opcheck(OPS.fmha_fwd_symbolic, (q, q, q, False, scale, threshold))
    for scale_or_none in (scale, None):
        options = ([5], [2], [1], [0], scale_or_none)
        torch.library.opcheck(OPS.neighborhood_fwd_symbolic, (q, q, q, *options))
    torch.library.opcheck(OPS.anchor_means_symbolic, (q, q, 64, 1, scale))
