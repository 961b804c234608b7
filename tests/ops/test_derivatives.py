"""Every way to ask for a derivative gives the right one, or an error that names the op."""

import contextlib

import pytest
import torch
from derivative_ways import BROKEN_GRAPHS, FIRST, REVERSE, WAYS, WITH_BACKWARD, lacking
from gradient_oracle import GRADIENTS, attend
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
    """How many of the results are no integers, which the counts of tiles are."""
    return len([x for x in run(name) if x.is_floating_point()])


def test_all_ops_are_here():
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name for name in registered if name.startswith("sparse_fmha::")}
    called = {f"sparse_fmha::{op_name(name)}" for name in CALLS}
    called |= {"sparse_fmha::decode", "sparse_fmha::decode_out"}  # test_decode_torch.py
    called |= {"sparse_fmha::neighborhood_out"}  # test_varlen_neighborhood.py
    called |= {"sparse_fmha::merge", "sparse_fmha::merge_into"}  # test_merge.py
    called |= {"sparse_fmha::hip_search"}  # test_hip_search_op.py
    called |= {"sparse_fmha::quest_pages"}  # test_quest_pages_op.py
    called |= {"sparse_fmha::ssa_choices"}  # test_ssa_choices_op.py
    scores = ("rows", "columns", "diagonals", "block_sums", "block_maxima")
    called |= {f"sparse_fmha::score_{name}" for name in scores}  # test_score_ops.py
    # Of sparse_fmha.distributed, if another test has imported it; tests/distributed runs them.
    ours -= {"sparse_fmha::pass_kv_fwd", "sparse_fmha::pass_kv_bwd"}
    assert ours == called | {name for name in ours if name.removesuffix(SUFFIX) in called}
    for name, arguments in CALLS.items():
        tensors = {n for n, value in arguments.items() if isinstance(value, torch.Tensor)}
        schema = op_of(name).default._schema
        of_schema = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
        optional = {"skip_threshold", "skipped", "page_table", "key_bias", "row_threshold"}
        assert of_schema - tensors <= optional


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("name", "argument"), CASES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_lacking_raises(way, name, argument, requires_grad):
    message = lacking(way, name, argument)
    x = example(name, argument).requires_grad_(requires_grad)
    for output in range(outputs(name)) if message else ():
        with pytest.raises(NotImplementedError, match=message):
            WAYS[way](function_of(name, argument, output), x)


def some(f):
    """Some of what a function returns, so that there are few derivatives."""
    return lambda x: f(x).flatten()[::41]


def expected_of(way, name, argument, output):
    """The derivative by the oracle, which takes no vmap."""
    mechanism, x = name.removesuffix("_fwd"), example(name, argument)

    def f(x):
        found = attend(mechanism, {**CALLS[name], argument: x})[output].to(x.dtype)
        return found + 0 * x.sum()  # a derivative also where there is none: of lse by v

    if way == "jacrev":
        return torch.autograd.functional.jacobian(some(f), x)
    if "vmap" in way:
        return REVERSE["grad"](some(f), x)[None]
    return REVERSE[way](some(f), x)


FIRST_CASES = [(n, a) for n, a in CASES if n in WITH_BACKWARD]


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize(("name", "argument"), FIRST_CASES)
@pytest.mark.parametrize("way", FIRST)
def test_first_derivatives_are_right(way, name, argument, output):
    expected = expected_of(way, name, argument, output)
    for requires_grad in (False, True):
        x = example(name, argument).requires_grad_(requires_grad)
        found = WAYS[way](some(function_of(name, argument, output)), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_all_that_could_have_gradients_has():
    for name in WITH_BACKWARD:
        assert set(floats(name)) <= set(GRADIENTS)


SYMBOLIC_OPS = [name for name in REAL_OPS if hasattr(OPS, op_name(name) + SUFFIX)]


@pytest.mark.parametrize("name", SYMBOLIC_OPS)
@pytest.mark.parametrize("way", ["jvp", "grad"])
def test_ops_of_symbolic_numbers_lack_the_same(way, name):
    op, arguments = getattr(OPS, op_name(name) + SUFFIX), CALLS[name]
    scale = torch.tensor(0.3, dtype=torch.float64)

    def attend(q):
        result = op(**{**arguments, "q": q, "scale": scale})
        return result if isinstance(result, torch.Tensor) else result[0]

    message = lacking(way, name)
    if message is None:
        found = WAYS[way](attend, example(name, "q"))
        plain = WAYS[way](lambda q: run(name, q=q, scale=0.3)[0], example(name, "q"))
        assert found.equal(plain)
        return
    message = message.replace(op_name(name), op_name(name) + SUFFIX)
    with pytest.raises(NotImplementedError, match=message):
        WAYS[way](attend, example(name, "q"))


@pytest.mark.filterwarnings("ignore:Error detected in")
# Where graphs are broken, torch itself gives 0 for this one, also of its own attention.
@pytest.mark.parametrize("way", [way for way in WAYS if way != "functional.hessian"])
@settings(max_examples=4)
@given(case=st.sampled_from(CASES), last=st.booleans(), requires_grad=st.booleans())
def test_compiled(way, case, last, requires_grad):
    """Right, or raised while it is traced, which torch.compile wraps with its text."""
    name, argument = case
    f = function_of(name, argument, outputs(name) - 1 if last else 0)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: WAYS[way](f, x), backend="aot_eager", fullgraph=way not in BROKEN_GRAPHS
    )
    x = example(name, argument)
    message = lacking(way, name, argument)
    if message is None:
        torch.testing.assert_close(compiled(x), WAYS[way](f, x))
        return
    message = message.partition(" has ")[0] + " has no"
    if way in BROKEN_GRAPHS:  # a compiled part has no such derivative, whatever is in it
        message += "|does not currently support double backward|must implement the jvp"
    errors = (NotImplementedError, RuntimeError, torch._dynamo.exc.TorchDynamoException)
    with pytest.raises(errors, match=message):
        compiled(x.requires_grad_(requires_grad))


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
    k = example("fmha_fwd", "k")
    f = function_of("fmha_fwd", "k", 0)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(NotImplementedError, match=lacking("jvp", "fmha_fwd")):
            WAYS["jvp"](f, k)
        grad = WAYS["grad"](f, k)
    cast = {x: CALLS["fmha_fwd"][x].bfloat16() for x in "qv"}
    expected = WAYS["grad"](lambda k: run("fmha_fwd", k=k.bfloat16(), **cast)[0], k)
    assert grad.dtype == torch.float32
    assert grad.equal(expected)
