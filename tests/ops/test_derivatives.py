"""Every way to ask for a derivative gives the right one, or an error that names the op."""

import contextlib

import pytest
import torch
from derivative_ways import BROKEN_GRAPHS, WAYS, lacking
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import CALLS, INTEGER_OPS, OPS, floats, op_name, op_of, run
from torch import func

from sparse_fmha._ops.symbolic import SUFFIX

REAL_OPS = [name for name in CALLS if name not in INTEGER_OPS]
CASES = [(name, argument) for name in REAL_OPS for argument in floats(name)]


def function_of(name, argument, output):
    return lambda x: run(name, **{argument: x})[output]


def example(name, argument):
    return CALLS[name][argument].clone()


def outputs(name):
    return 1 if name == "anchor_means" else 2  # out and lse; tiles are integers


def test_all_ops_are_here():
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name for name in registered if name.startswith("sparse_fmha::")}
    called = {f"sparse_fmha::{op_name(name)}" for name in CALLS}
    assert ours == called | {name for name in ours if name.removesuffix(SUFFIX) in called}
    for name, arguments in CALLS.items():
        tensors = {n for n, value in arguments.items() if isinstance(value, torch.Tensor)}
        schema = op_of(name).default._schema
        of_schema = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
        assert of_schema - tensors <= {"skip_threshold"}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("name", "argument"), CASES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_lacking_raises(way, name, argument, requires_grad):
    x = example(name, argument).requires_grad_(requires_grad)
    for output in range(outputs(name)):
        message = f"sparse_fmha::{op_name(name)} has {lacking(way)}"
        with pytest.raises(NotImplementedError, match=message):
            WAYS[way](function_of(name, argument, output), x)


SYMBOLIC_OPS = [name for name in REAL_OPS if hasattr(OPS, op_name(name) + SUFFIX)]


@pytest.mark.parametrize("name", SYMBOLIC_OPS)
@pytest.mark.parametrize("way", ["jvp", "grad"])
def test_ops_of_symbolic_numbers_lack_the_same(way, name):
    op, arguments = getattr(OPS, op_name(name) + SUFFIX), CALLS[name]
    scale = torch.tensor(0.3, dtype=torch.float64)

    def attend(q):
        result = op(**{**arguments, "q": q, "scale": scale})
        return result if isinstance(result, torch.Tensor) else result[0]

    with pytest.raises(
        NotImplementedError, match=f"sparse_fmha::{op_name(name)}{SUFFIX} has {lacking(way)}"
    ):
        WAYS[way](attend, example(name, "q"))


@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=4)
@given(case=st.sampled_from(CASES), last=st.booleans(), requires_grad=st.booleans())
def test_what_is_lacking_raises_compiled(way, case, last, requires_grad):
    """torch.compile wraps what is raised while it traces, with its text."""
    name, argument = case
    f = function_of(name, argument, outputs(name) - 1 if last else 0)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: WAYS[way](f, x), backend="aot_eager", fullgraph=way not in BROKEN_GRAPHS
    )
    errors = (NotImplementedError, torch._dynamo.exc.TorchDynamoException)
    with pytest.raises(errors, match=f"sparse_fmha::{op_name(name)} has no"):
        compiled(example(name, argument).requires_grad_(requires_grad))


@pytest.mark.parametrize("name", REAL_OPS)
@pytest.mark.parametrize("way", WAYS)
def test_the_op_beside_a_derivative(way, name):
    """Only what the derivative is taken by may not reach the op."""
    x = torch.tensor([0.3, -0.7])

    def function(x):
        results = [
            run(name),
            run(name, **{a: example(name, a) + 0 * x.detach().sum() for a in floats(name)}),
        ]
        return x**3 + sum(result[0].sum() for result in results)

    offset = function(x) - x**3
    expected = WAYS[way](lambda x: x**3 + offset, x)
    torch.testing.assert_close(WAYS[way](function, x), expected)


def test_the_op_beside_a_derivative_compiled():
    x = torch.tensor([0.3, -0.7])
    for way in ("jvp", "grad"):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, way=way: WAYS[way](lambda x: x**3 + run("fmha_fwd")[0].sum(), x),
            backend="aot_eager",
        )
        torch.testing.assert_close(compiled(x), WAYS[way](lambda x: x**3, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_the_forward_goes_on(name, argument, mode):
    expected = run(name)
    with mode():
        results = run(name, **{argument: example(name, argument).requires_grad_()})
    recorded = mode is contextlib.nullcontext
    for result, wanted in zip(results, expected, strict=True):
        assert result.equal(wanted)
        assert result.requires_grad == (recorded and wanted.is_floating_point())
    primal, _ = func.vjp(function_of(name, argument, 0), example(name, argument))
    assert primal.equal(expected[0])


@pytest.mark.parametrize("name", INTEGER_OPS)
def test_integers_have_no_derivative(name):
    """As those of torch.argmax."""
    expected = run(name)
    for argument in floats(name):
        x = example(name, argument)
        assert not run(name, **{argument: x.clone().requires_grad_()})[0].requires_grad
        results, tangents = func.jvp(lambda x, a=argument: run(name, **{a: x}), (x,), (x,))
        assert all(a.equal(b) for a, b in zip(results, expected, strict=True))
        assert not any(tangent.any() for tangent in tangents)


def test_autocast():
    for way in ("jvp", "grad"):
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(NotImplementedError, match=f"fmha_fwd has {lacking(way)}"),
        ):
            WAYS[way](function_of("fmha_fwd", "k", 0), example("fmha_fwd", "k"))
