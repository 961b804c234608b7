"""sdpa against torch's own, and the routing of calls."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import sparse_fmha
from sparse_fmha import route_sdpa, sdpa
from sparse_fmha._routing import sdpa_call

torch_sdpa = torch.nn.functional.scaled_dot_product_attention


def given(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("q_len", "kv_len"), [(70, 70), (30, 90), (90, 30), (1, 40), (40, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_as_torch(q_len, kv_len, is_causal, scale):
    q, k, v = given((2, 4, q_len, 16), (2, 4, kv_len, 16), (2, 4, kv_len, 16))
    out = sdpa(q, k, v, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(out, torch_sdpa(q, k, v, is_causal=is_causal, scale=scale))
    assert out.shape == q.shape


@pytest.mark.parametrize(
    "shape", [(150, 170), (1, 1, 150, 170), (2, 1, 1, 170), (1, 4, 150, 170), (2, 4, 150, 1)]
)
def test_masks(shape):
    """Also rows that see nothing, which are 0 in torch, too."""
    q, k, v = given((2, 4, 150, 16), (2, 4, 170, 16), (2, 4, 170, 16))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = mask.index_fill(-2, torch.tensor([0]), False) if shape[-2] > 1 else mask
    torch.testing.assert_close(sdpa(q, k, v, mask), torch_sdpa(q, k, v, mask))


def test_three_dimensions():
    q, k, v = given((3, 50, 16), (3, 60, 16), (3, 60, 16))
    mask = torch.rand(3, 50, 60, generator=torch.Generator().manual_seed(1)) < 0.6
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask[0]}):
        torch.testing.assert_close(sdpa(q, k, v, **options), torch_sdpa(q, k, v, **options))


@pytest.mark.parametrize(("heads_kv", "enable_gqa"), [(2, True), (1, True), (1, False)])
def test_grouped_heads(heads_kv, enable_gqa):
    """Torch broadcasts one head, also where grouped heads are not asked for."""
    q, k, v = given((2, 8, 50, 16), (2, heads_kv, 50, 16), (2, heads_kv, 50, 16))
    options = {"is_causal": True, "enable_gqa": enable_gqa}
    torch.testing.assert_close(sdpa(q, k, v, **options), torch_sdpa(q, k, v, **options))


def test_heads_that_do_not_fit():
    q, k, v = given((2, 8, 50, 16), (2, 2, 50, 16), (2, 2, 50, 16))
    with pytest.raises(
        ValueError, match="key must have 1 head or the 8 heads of query unless enable_gqa is True,"
    ):
        sdpa(q, k, v)


def test_nothing_is_copied():
    """Views of a [B, L, H, D] tensor, as models make them, arrive at the op as they are."""
    q = given((2, 50, 4, 16))[0].transpose(1, 2)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.sparse_fmha.fmha_fwd:
                seen.extend(x.data_ptr() for x in args[:3])
            return func(*args, **(kwargs or {}))

    with Watch():
        sdpa(q, q, q)
    assert seen == [q.data_ptr()] * 3


REFUSED = [
    ({"dropout_p": 0.1}, {}, "dropout_p must be 0, got 0.1"),
    ({"attn_mask": torch.zeros(20, 20)}, {}, "attn_mask must have .*dtype.*, got torch.float32"),
    ({}, {"dim": 12}, "head dim of q must be a multiple of 8 from 8 to 256, got 12"),
    ({}, {"dim": 264}, "head dim of q must be a multiple of 8 from 8 to 256, got 264"),
    ({}, {"dtype": torch.complex64}, "q must have .*dtype.*, got torch.complex64"),
    ({}, {"lead": (2,)}, "query must have 3 or 4 dimensions, as many as query, got 5"),
]


def refused(dim=16, dtype=torch.float32, lead=()):
    return given((*lead, 1, 2, 20, dim))[0].to(dtype)


@pytest.mark.parametrize(("options", "sizes", "message"), REFUSED)
def test_what_is_not_there(options, sizes, message):
    q = refused(**sizes)
    with pytest.raises(NotImplementedError, match=f"^sparse_fmha.sdpa: {message}"):
        sdpa(q, q, q, **options)


def test_a_mask_and_causal():
    q = refused()
    with pytest.raises(ValueError, match="is_causal must be False with an attn_mask, got True"):
        sdpa(q, q, q, torch.ones(20, 20).bool(), is_causal=True)


def test_routing():
    q = refused()
    mask = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 0] = True

    def model(x):
        functional = torch.nn.functional
        x = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return functional.scaled_dot_product_attention(x, x, x, mask.float())

    plain = model(q)
    with route_sdpa() as routes:
        routed = model(q)
    torch.testing.assert_close(routed, plain)
    assert (routes.routed, dict(routes.left)) == (
        2,
        {"attn_mask must have dtype torch.bool, got torch.float32": 1},
    )
    assert str(routes).splitlines()[0] == "2 calls routed to sparse_fmha"
    assert "1 left to torch: attn_mask must have dtype" in str(routes)
    model(q)
    assert routes.routed == 2


WRONG = [
    ((None,), {}, TypeError, "query must be a tensor, got NoneType"),
    (("nested",), {}, TypeError, r"query must be a dense \(strided\) tensor, got a nested tensor"),
    (
        ("sparse",),
        {},
        TypeError,
        r"query must be a dense \(strided\) tensor, got layout torch.sparse_coo",
    ),
    ((), {"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    ((), {"enable_gqa": 1}, TypeError, "enable_gqa must be True or False, got 1"),
    ((), {"dropout_p": None}, TypeError, "dropout_p must be a float, got None"),
    ((), {"scale": "x"}, TypeError, "scale must be a float, got 'x'"),
    (
        (),
        {"scale": 10**400},
        NotImplementedError,
        "sparse_fmha.sdpa: scale must be a finite number, got",
    ),
    ((), {"attn_mask": [[True]]}, TypeError, "attn_mask must be a tensor, got list"),
    (
        (),
        {"attn_mask": torch.ones(20).bool()},
        ValueError,
        r"attn_mask must have 2 to 4 dimensions that broadcast to \[1, 2, 20,",
    ),
    (
        (),
        {"attn_mask": torch.ones(20, 19).bool()},
        ValueError,
        r"attn_mask must have .*, got .*\[20, 19\]",
    ),
    ((), {"attn_mask": torch.ones(3, 20, 20).bool()}, ValueError, r"broadcast to \[1, 2, 20, 20\]"),
]


@pytest.mark.parametrize(("first", "options", "error", "message"), WRONG)
def test_wrong_arguments(first, options, error, message):
    q = refused()
    made = {"nested": torch.nested.nested_tensor([q[0]]), "sparse": q.to_sparse(), None: None}
    with pytest.raises(error, match=message):
        sdpa(*[made[name] for name in first] or [q], q, q, **options)


def test_forward_mode():
    q = refused()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(
            NotImplementedError,
            match=r"sparse_fmha.sdpa: key must not have a tangent: forward-mode derivatives",
        ):
            sdpa(q, dual, q)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, "mask"])
def test_gradients(options):
    """Through sdpa itself and through a routed call."""
    if options == "mask":
        mask = torch.rand(30, 25, generator=torch.Generator().manual_seed(1)) < 0.6
        options = {"attn_mask": mask}
    tensors = [x.requires_grad_() for x in given((2, 4, 30, 16), (2, 4, 25, 16), (2, 4, 25, 16))]
    expected = torch.autograd.grad(torch_sdpa(*tensors, **options).square().sum(), tensors)
    own = torch.autograd.grad(sdpa(*tensors, **options).square().sum(), tensors)
    with route_sdpa() as routes:
        routed = torch.autograd.grad(torch_sdpa(*tensors, **options).square().sum(), tensors)
    assert routes.routed == 1
    for a, b, c in zip(own, routed, expected, strict=True):
        torch.testing.assert_close(a, c)
        assert a.equal(b)


def test_no_kernel_for_gradients(monkeypatch):
    """A device with kernels of the forward pass alone."""

    def raises(*args, **kwargs):
        raise NotImplementedError("no kernel for pass=backward_dq\nand more")

    q = refused().requires_grad_()
    sdpa_call._problem_with.cache_clear()
    monkeypatch.setattr(torch.autograd, "grad", raises)
    with route_sdpa() as routes:
        torch_sdpa(q, q, q)
        with torch.no_grad():
            torch_sdpa(q, q, q)
    sdpa_call._problem_with.cache_clear()
    assert routes.routed == 1
    assert routes.left == {"no kernel for pass=backward_dq": 1}


@pytest.fixture
def no_kernel(monkeypatch):
    """The ops raise as in a build without kernels for the device, and on another GPU."""

    def raises(*args, **kwargs):
        raise RuntimeError("sparse_fmha: no kernel for this; compiled in are:\n  none")

    sdpa_call._problem_with.cache_clear()
    for name in ("attention", "block_sparse_attention"):
        monkeypatch.setattr(sdpa_call, name, raises)
    yield
    sdpa_call._problem_with.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
def test_no_kernel(no_kernel, masked):
    q = refused()
    mask = torch.ones(20, 20).bool() if masked else None
    with route_sdpa() as routes:
        out = torch_sdpa(q, q, q, mask)
    assert out.equal(torch_sdpa(q, q, q, mask))
    assert routes.left == {"sparse_fmha: no kernel for this; compiled in are:": 1}
    with pytest.raises(RuntimeError, match="no kernel for this"):
        sdpa(q, q, q, mask)


@pytest.fixture
def graphs():
    """A backend that counts what it compiles, which is then seen by no mode."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield counter
    torch.compiler.reset()


def test_a_compiled_model(graphs):
    """Compiled once, whatever the counts are; the calls inside are torch's and are reported."""
    q = refused()
    mask = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    model = torch.compile(
        lambda x: torch_sdpa(torch_sdpa(x, x, x, is_causal=True), x, x, mask),
        backend=graphs,
        fullgraph=True,
    )
    with route_sdpa() as outer, route_sdpa() as routes:
        outs = [model(q) for _ in range(3)]
        torch_sdpa(q, q, q)
    plain = torch_sdpa(torch_sdpa(q, q, q, is_causal=True), q, q, mask)
    for out in outs:
        torch.testing.assert_close(out, plain)
    assert graphs.frame_count == 1
    assert routes.routed == 1
    assert outer.routed == 0
    assert sum(routes.left.values()) == 4  # two calls that two modes see
    assert list(routes.left) == ["inside torch.compile, counted when it was compiled"]


def test_routing_inside_a_compiled_function(graphs):
    q = refused()

    def model(x):
        with route_sdpa():
            return torch_sdpa(x, x, x)

    with pytest.warns(UserWarning, match="route_sdpa has no effect inside a compiled function"):
        out = torch.compile(model, backend=graphs)(q)
    torch.testing.assert_close(out, torch_sdpa(q, q, q))


def test_a_traced_model():
    """A trace would hold lengths and masks as they were."""
    q, longer = given((1, 2, 20, 16), (1, 2, 30, 16))
    model = lambda x: torch_sdpa(x, x[:, :, :15], x[:, :, :15], is_causal=True)  # noqa: E731
    with route_sdpa() as routes:
        traced = torch.jit.trace(model, q)
    assert set(routes.left) == {"inside torch.jit.trace"}
    torch.testing.assert_close(traced(longer), model(longer))


def test_dispatch_modes():
    """Masks are evaluated, so they must be there: not while something else is recorded."""
    q = refused()
    mask = torch.ones(20, 20).bool()
    with FlopCounterMode(display=False), route_sdpa() as routes:
        torch_sdpa(q, q, q)
        torch_sdpa(q, q, q, mask)
    assert routes.routed == 1
    assert routes.left == {"values cannot be read inside a TorchDispatchMode": 1}
    with FakeTensorMode() as fake, route_sdpa() as routes:
        x = fake.from_tensor(q)
        assert torch_sdpa(x, x, x, fake.from_tensor(mask)).shape == q.shape
    assert routes.left == {"FakeTensor handles torch's functions itself": 1}


def test_it_is_exported():
    assert {"sdpa", "route_sdpa"} <= set(sparse_fmha.__all__)
