"""The GPU tests: skipped without a GPU that runs the library's kernels; self-contained, so that
they run where only the op library and pytest are: `pytest --confcutdir=tests/gpu tests/gpu`.

SPARSE_FMHA_TEST_ARCH=sm80 (or sm86) tests that architecture's kernels, on any GPU that runs them.
With the emulated build of the package (tests/emulator) the device is the CPU, for chosen tests.
"""

import functools

import emulated
import other_archs
import pytest
import torch
from poison import poisoned

import arch_table
import sparse_fmha
from sparse_fmha import reference


@pytest.fixture(scope="session", autouse=True)
def cuda():
    """The device under test."""
    if emulated.is_loaded():
        sparse_fmha.allow_untested()
        with other_archs.chosen():
            yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    known = [each for arch in arch_table.read() for each in arch.capabilities]
    if capability not in known:
        pytest.skip(f"compute capability {capability}; the kernels are for {', '.join(known)}")
    sparse_fmha.allow_untested()  # whoever runs the tests of kernels wants to know if they work
    with other_archs.chosen():
        yield torch.device("cuda")
    sparse_fmha.allow_untested(False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips a test that ended because the architecture lacks a kernel."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        if why := other_archs.reason(error) or emulated.why_skipped(error):
            pytest.skip(why)
        raise


@pytest.fixture
def one_kernel():
    """Calls of any size take the same kernel: their bits are compared.

    Else dense and causal calls choose among kernels with several query tiles, by their work, and
    decode takes another kernel for few rows.
    """
    module = pytest.importorskip("sparse_fmha._C")
    before = module.set_tile_q_override(192)
    yield
    module.set_tile_q_override(before)


@pytest.fixture
def nobody_waits(cuda):
    """The host must not wait for the device, until the test sets the mode to "default" itself."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def randn(cuda):
    """randn(*shape, dtype, seed): normal values on the GPU."""

    def make(*shape, dtype=torch.bfloat16, seed=0):
        generator = torch.Generator(cuda).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=cuda, dtype=torch.float32).to(dtype)

    return make


@pytest.fixture(scope="session")
def make_qkv(randn):
    """make_qkv(batch, len_q, len_kv, heads, heads_kv, dim, dtype, seed): three tensors."""

    def make(batch, len_q, len_kv, heads, heads_kv, dim, dtype=torch.bfloat16, seed=0):
        q = randn(batch, len_q, heads, dim, dtype=dtype, seed=3 * seed)
        k = randn(batch, len_kv, heads_kv, dim, dtype=dtype, seed=3 * seed + 1)
        v = randn(batch, len_kv, heads_kv, dim, dtype=dtype, seed=3 * seed + 2)
        return q, k, v

    return make


@pytest.fixture(scope="session")
def tensors(randn):
    """tensors(case, seed): q, k, v, extra_k, extra_v; no extra tensors without extra tokens."""

    def make(case, seed=0):
        def one(place, *tokens, heads=case.heads_kv):
            shape = case.batch, *tokens, heads, case.dim
            return randn(*shape, dtype=case.dtype, seed=5 * seed + place)

        extra = (one(3, case.extra), one(4, case.extra)) if case.extra else (None, None)
        return one(0, *case.grid, heads=case.heads), one(1, *case.grid), one(2, *case.grid), *extra

    return make


@pytest.fixture(scope="session")
def attend():
    """attend(q, k, v, window, **options): (out, lse), computed in memory that held NaN before.

    Of neighborhood attention where a window is given.
    """

    def run(q, k, v, window=None, **options):
        function = sparse_fmha.attention
        if window is not None:
            function = functools.partial(sparse_fmha.neighborhood_attention, window=window)
        with poisoned():
            return function(q, k, v, return_lse=True, **options)

    return run


@pytest.fixture(scope="session")
def agrees():
    """agrees(out, lse, q, k, v, causal, scale, visible): assert that (out, lse) is attention.

    The tokens may lie on a grid; k and v may have more of them than q. Without a mask `visible`
    attention is dense or causal.

    The largest and the root mean square error of out against fp64 are at most twice those of
    attention in fp32 with the two roundings that a fused kernel cannot avoid, of the weights
    and of the result; plus one unit in the last place. lse is held to 1e-3.
    """

    def check(out, lse, q, k, v, causal=False, scale=None, visible=None):
        __tracebackhide__ = True
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        assert lse.shape == q.shape[:-1]
        assert lse.dtype == torch.float32
        assert lse.is_contiguous()
        out, q, k, v = (x.flatten(1, -3) for x in (out, q, k, v))
        lse = lse.flatten(1, -2)
        if visible is None:
            visible = _visible(q.shape[1], k.shape[1], causal, q.device)
        exact, exact_lse = reference.attention(q, k, v, visible, scale)
        # At equal places -inf is close to -inf, and to nothing else.
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-3)
        assert out.isfinite().all(), f"{(~out.isfinite()).sum()} entries are not finite"
        # A token's errors in units of its largest output: tokens with many keys have small ones.
        size = exact.abs().amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        ours = (out.double() - exact).abs() / size
        theirs = (_fused(q, k, v, visible, scale).double() - exact).abs() / size
        for name, figure in (("largest", torch.amax), ("rms", _rms)):
            error = figure(ours).item()
            allowed = 2 * figure(theirs).item() + torch.finfo(q.dtype).eps
            assert error <= allowed, (
                f"{name} error {error:.3g}, {allowed:.3g} is allowed; worst at "
                f"{tuple(map(int, torch.unravel_index(ours.argmax(), ours.shape)))}"
            )

    return check


@pytest.fixture(scope="session")
def check(tensors, attend, agrees):
    """check(case, given): (out, lse) of the case, on the tensors given, which agree with fp64."""

    def run(case, given=None):
        __tracebackhide__ = True
        q, k, v, extra_k, extra_v = given or tensors(case)
        out, lse = attend(q, k, v, extra_k=extra_k, extra_v=extra_v, **case.options())
        if case.extra:
            k, v = (torch.cat([x.flatten(1, -3), y], 1) for x, y in ((k, extra_k), (v, extra_v)))
        agrees(out, lse, q, k, v, scale=case.scale, visible=case.visible(q.device))
        return out, lse

    return run


def _visible(len_q, len_kv, causal, device):
    if causal:
        return reference.causal_mask(len_q, len_kv, device)
    return torch.ones(len_q, len_kv, dtype=torch.bool, device=device)


def _fused(q, k, v, visible, scale):
    """fp32 attention that rounds the weights, then the result, to q's dtype."""
    group = q.shape[2] // k.shape[2]
    wide = (x.float().transpose(1, 2) for x in (q, k, v))
    wide_q, wide_k, wide_v = wide
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))
    scores = (wide_q @ wide_k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0)
    total = weights.sum(-1, keepdim=True).clamp(min=1)
    return (weights.to(q.dtype).float() @ wide_v / total).to(q.dtype).transpose(1, 2)


def _rms(x):
    return x.square().mean().sqrt()
