"""The backward pass as a part of PyTorch: autograd, tracing, checkpointing, autocast, errors."""

import contextlib
from unittest import mock

import pytest
import torch
from gradient_cases import CASES
from gradient_oracle import GRADIENTS
from torch.utils.checkpoint import checkpoint

import sparse_fmha
from sparse_fmha import BlockGrid, StripeMask
from sparse_fmha._ops import errors, gradients

OPS = torch.ops.sparse_fmha
# One of each mechanism.
NAMES = ("causal", "2-D, causal on one axis", "blocks 64x16", "stripes")
names = pytest.mark.parametrize("name", NAMES)


def inputs(arguments):
    return [n for n in GRADIENTS if n in arguments]


@contextlib.contextmanager
def backward_calls():
    """The arguments of the backward ops that run inside."""
    calls = []
    run = gradients._run

    def noting(op, *args):
        calls.append(dict(zip([a.name for a in op._schema.arguments], args, strict=False)))
        return run(op, *args)

    with mock.patch.object(gradients, "_run", noting):
        yield calls


@names
def test_only_what_needs_gradients_is_computed(name):
    arguments = CASES[name].arguments()
    out, _ = CASES[name].forward({**arguments, "q": arguments["q"].requires_grad_()})
    with backward_calls() as calls:
        out.sum().backward()
    assert (calls[0]["need_dq"], calls[0]["need_dkv"]) == (True, False)
    for of in inputs(arguments)[1:]:
        arguments = CASES[name].arguments()
        out, _ = CASES[name].forward({**arguments, of: arguments[of].requires_grad_()})
        with backward_calls() as calls:
            out.sum().backward()
        assert (calls[0]["need_dq"], calls[0]["need_dkv"]) == (False, True)
        assert [n for n in inputs(arguments) if arguments[n].grad is not None] == [of]


@names
@pytest.mark.parametrize("wanted", [False, True])
def test_whether_bits_may_vary_is_what_held_in_the_forward_pass(name, wanted):
    arguments = CASES[name].arguments()
    arguments["q"].requires_grad_()
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(wanted)
        out, _ = CASES[name].forward(arguments)
        torch.use_deterministic_algorithms(not wanted)
        with backward_calls() as calls:
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert calls[0]["deterministic"] is wanted


@names
def test_outputs_without_a_gradient_have_none(name):
    arguments = CASES[name].arguments()
    tensors = [arguments[n].requires_grad_() for n in inputs(arguments)]
    out, lse = CASES[name].forward(arguments)
    with backward_calls() as calls:
        torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        torch.autograd.grad(lse.nan_to_num(0, 0, 0).sum(), tensors)
    assert calls[0]["dlse"] is None
    assert calls[1]["dlse"] is not None
    assert set(calls[1]["dout"].stride()) == {0}, "nothing as large as out"


@names
def test_saved_tensors(name):
    """q, k, v, out, lse and the lists, and no other tensors."""
    arguments = CASES[name].arguments()
    for n in inputs(arguments):
        arguments[n].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = CASES[name].forward(arguments)
    given = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    addresses = {x.data_ptr() for x in (*given, out, lse)}
    assert {x.data_ptr() for x in saved} == addresses
    assert len(saved) == len(addresses)


@names
def test_a_change_in_place_is_seen(name):
    arguments = CASES[name].arguments()
    out, _ = CASES[name].forward({**arguments, "q": arguments["q"].requires_grad_()})
    with torch.no_grad():
        arguments["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "1-D, dilation, causal", "dense, more keys"])
def test_opcheck(name, of_lse):
    case = CASES[name]
    arguments = case.arguments(torch.float32)
    for n in inputs(arguments):
        arguments[n].requires_grad_()
    torch.library.opcheck(getattr(OPS, f"{case.mechanism}_fwd"), (), arguments)
    with torch.no_grad():
        out, lse = case.forward(arguments)
    arguments = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    given = {"dout": torch.randn_like(out), "dlse": torch.randn_like(lse) if of_lse else None}
    given |= {"out": out, "lse": lse, **arguments}
    op = getattr(OPS, f"{case.mechanism}_bwd")
    torch.library.opcheck(op, (), given)
    torch.library.opcheck(op, (), {**given, "need_dq": False})
    torch.library.opcheck(op, (), {**given, "need_dkv": False})


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_checkpoints_recompute_the_same_bits(name, dtype):
    case = CASES[name]
    arguments = case.arguments(dtype)
    tensors = [arguments[n].requires_grad_() for n in inputs(arguments)]

    def run(*tensors):
        given = dict(zip(inputs(arguments), tensors, strict=True))
        return case.forward({**arguments, **given})[0].sin()

    plain = torch.autograd.grad(run(*tensors).sum(), tensors)
    again = torch.autograd.grad(checkpoint(run, *tensors, use_reentrant=False).sum(), tensors)
    for a, b in zip(plain, again, strict=True):
        assert a.equal(b)


def block_sparse(q, k, v, **options):
    grid = BlockGrid.of(q, k, 64, 32, causal=True)
    mask = grid.mask(grid.sink(32) | grid.local(64))
    return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)


def stripe(q, k, v, **options):
    seen = torch.arange(k.shape[1]) % 3 != 0
    seen = seen.expand(1, 1, -(-q.shape[1] // 64), -1)
    mask = StripeMask.from_columns(seen, q.shape[1], 64, causal=True, width=k.shape[1])
    return sparse_fmha.stripe_attention(q, k, v, mask, **options)


FUNCTIONS = {
    "dense": lambda q, k, v, **o: sparse_fmha.attention(q, k, v, causal=True, **o),
    "neighborhood": lambda q, k, v, **o: sparse_fmha.neighborhood_attention(
        q, k, v, 9, extra_k=k[:, :3].detach(), extra_v=v[:, :3].detach(), **o
    ),
    "block lists": block_sparse,
    "stripes": stripe,
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def loss(function, *tensors, **options):
    out, lse = function(*tensors, return_lse=True, **options)
    return out.float().square().sum() + lse.sin().sum()


@functions
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(randn, function, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (80, 131):
        tensors = [randn(2, length, h, 16, seed=h).requires_grad_() for h in (4, 2, 2)]
        expected = torch.autograd.grad(loss(function, *tensors), tensors)
        found = torch.autograd.grad(compiled(function, *tensors), tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@functions
def test_compiled_with_a_scale_that_is_a_variable(randn, function):
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    tensors = [randn(1, 70, h, 16, seed=h).requires_grad_() for h in (2, 1, 1)]
    for scale in (0.3, 0.7, -0.2):
        found = torch.autograd.grad(compiled(function, *tensors, scale=scale), tensors)
        expected = torch.autograd.grad(loss(function, *tensors, scale=scale), tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@functions
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(randn, function, inside):
    """Gradients in the dtype of the inputs, and those of a cast before the call."""
    tensors = [randn(2, 70, h, 16, seed=h).requires_grad_() for h in (4, 2, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(function, *tensors)
        if inside:
            found = torch.autograd.grad(total, tensors)
    if not inside:
        found = torch.autograd.grad(total, tensors)
    cast = loss(function, *(x.bfloat16() for x in tensors))
    for a, b in zip(found, torch.autograd.grad(cast, tensors), strict=True):
        assert a.dtype == torch.float32
        assert a.equal(b)


@functions
def test_a_second_derivative_names_the_op(randn, function):
    tensors = [randn(1, 70, h, 16, seed=h).requires_grad_() for h in (2, 1, 1)]
    found = torch.autograd.grad(loss(function, *tensors), tensors, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="_bwd has no backward pass yet: second derivatives"
    ):
        found[0].sum().backward()


@functions
def test_a_threshold_of_0_has_the_gradients_of_a_call_without(randn, function):
    tensors = [randn(1, 70, h, 16, seed=h, dtype=torch.float64).requires_grad_() for h in (2, 1, 1)]
    expected = torch.autograd.grad(loss(function, *tensors), tensors)
    threshold = torch.zeros(1)
    found = torch.autograd.grad(loss(function, *tensors, skip_threshold=threshold), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_merged_parts_have_the_gradients_of_the_whole(randn):
    """Which go through both outputs of each part."""
    q, k, v = (randn(2, n, 2, 16, seed=n, dtype=torch.float64) for n in (40, 90, 91))
    tensors = [x.requires_grad_() for x in (q, k, v[:, :90])]
    q, k, v = tensors
    parts = [
        sparse_fmha.attention(q, k[:, part], v[:, part], return_lse=True)
        for part in (slice(0, 30), slice(30, 35), slice(35, 90))
    ]
    out, lse = sparse_fmha.merge(*zip(*parts, strict=True))
    whole, whole_lse = sparse_fmha.attention(q, k, v, return_lse=True)
    found = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), tensors)
    expected = torch.autograd.grad(whole.sin().sum() + whole_lse.cos().sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # lse is fp32


def dense_arguments():
    arguments = CASES["causal"].arguments(torch.float32)
    out, lse = CASES["causal"].forward(arguments)
    return {"dout": out.clone(), "dlse": lse.clone(), "out": out, "lse": lse, **arguments}


BAD = {
    "dout of another shape": (
        "dout",
        lambda x: x[:, :3],
        r"dout must have q's shape, \[1, 19, 4, 8\], got \[1, 3, 4, 8\]",
    ),
    "out of another rank": (
        "out",
        lambda x: x[0],
        r"out must have q's shape, \[1, 19, 4, 8\], got \[19, 4, 8\]",
    ),
    "lse of another shape": (
        "lse",
        lambda x: x[..., :1],
        r"lse must have q's shape without the head dim, of \[1, 19, 4, 8\], got",
    ),
    "dlse of another rank": (
        "dlse",
        lambda x: x[..., None],
        r"dlse must have q's shape without the head dim, of \[1, 19, 4, 8\], got",
    ),
    "dout of another dtype": (
        "dout",
        lambda x: x.double(),
        "dout must have q's dtype, Float, got Double",
    ),
    "out of another dtype": ("out", lambda x: x.half(), "out must have q's dtype, Float, got Half"),
    "lse of another dtype": ("lse", lambda x: x.double(), "lse must have .*dtype.*, got Double"),
    "dlse of another dtype": ("dlse", lambda x: x.half(), "dlse must have .*dtype.*, got Half"),
    "k": ("k", lambda x: x[:, :, :, :4], "k must have q's head dim, 8, got 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    name, change, message = BAD[case]
    arguments = dense_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.fmha_bwd(**arguments)


@pytest.fixture
def refusing(monkeypatch):
    """Makes the ops raise an error as C++ does."""

    def refuse(name, text):
        def op(*args):
            raise RuntimeError(text)

        monkeypatch.setattr(OPS, name, op)
        return op

    return refuse


@pytest.mark.parametrize("checked", [False, True], ids=["by the op", "before"])
def test_no_kernel_of_the_forward_pass(randn, refusing, checked):
    q, k, v = (randn(1, 70, h, 16, seed=h) for h in (2, 1, 1))
    scale = 1 if checked else 1.0  # the op takes floats alone unchecked
    for text in (f"{errors.NOT_IMPLEMENTED}sparse_fmha: no kernel", "out of memory"):
        refusing("fmha_fwd", text)
        with pytest.raises(RuntimeError) as raised:
            sparse_fmha.attention(q, k, v, scale=scale)
        implemented = text == "out of memory"
        assert type(raised.value) is (RuntimeError if implemented else NotImplementedError)
        assert str(raised.value) == text.removeprefix(errors.NOT_IMPLEMENTED)


def test_no_kernel_of_the_backward_pass(refusing):
    op = refusing("fmha_bwd", f"{errors.NOT_IMPLEMENTED}sparse_fmha: no kernel for this\nand more")
    with pytest.raises(NotImplementedError, match=r"^sparse_fmha: no kernel for this\nand"):
        gradients._run(op)
    with pytest.raises(RuntimeError, match=r"^out of memory"):
        gradients._run(refusing("fmha_bwd", "out of memory"))
