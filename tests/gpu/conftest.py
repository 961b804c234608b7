"""The GPU tests: skipped without a Hopper GPU; self-contained, so that they run where only the op
library and pytest are: `pytest --confcutdir=tests/gpu tests/gpu`.
"""

import contextlib

import pytest
import torch

import sparse_fmha
from sparse_fmha import reference


@pytest.fixture(scope="session", autouse=True)
def cuda():
    """The device under test."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        pytest.skip(f"compute capability {capability}; the kernels are for (9, 0)")
    return torch.device("cuda")


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
def attend():
    """attend(q, k, v, **options): (out, lse), computed in memory that held NaN before."""

    def run(q, k, v, **options):
        with _poisoned():
            return sparse_fmha.attention(q, k, v, return_lse=True, **options)

    return run


@pytest.fixture(scope="session")
def agrees():
    """agrees(out, lse, q, k, v, causal, scale): assert that (out, lse) is attention.

    The largest and the root mean square error of out against fp64 are at most twice those of
    attention in fp32 with the two roundings that a fused kernel cannot avoid, of the weights
    and of the result; plus one unit in the last place. lse is held to 1e-3.
    """

    def check(out, lse, q, k, v, causal=False, scale=None):
        __tracebackhide__ = True
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        assert lse.shape == q.shape[:-1]
        assert lse.dtype == torch.float32
        assert lse.is_contiguous()
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


@contextlib.contextmanager
def _poisoned():
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


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
