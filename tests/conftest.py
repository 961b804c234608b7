"""How results are judged: against fp64, by the error that PyTorch itself makes.

Everything is a session fixture, so that Hypothesis tests can use it.
"""

import os
import re
import shlex

# Read when torch loads. Threads that spin while they wait slow small problems down tenfold where
# other processes run too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hostile_defaults
import poison
import pytest
import quick
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_fmha import reference

try:
    import hypothesis
except ImportError:  # the GPU tests need neither it nor what is here
    hypothesis = None


def pytest_addoption(parser):
    parser.addoption("--example", metavar="ARGS", help="the only arguments of Hypothesis tests")
    parser.addoption(
        "--other-default",
        action="append",
        choices=hostile_defaults.CHOICES,
        help="default device or dtype that only the package meets; both may be given",
    )


def pytest_configure(config):
    if config.getoption("--other-default", None):
        hostile_defaults.apply(config.getoption("--other-default"))
    if hypothesis:
        only = (
            {"phases": [hypothesis.Phase.explicit]} if config.getoption("--example", None) else {}
        )
        hypothesis.settings.register_profile("default", deadline=None, **only)
        hypothesis.settings.load_profile("default")


def pytest_ignore_collect(collection_path, config):
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if config.getoption("--other-default", None) and not named:
        return any(map(collection_path.match, hostile_defaults.NOT_RUN)) or None
    return None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    for item in filter(quick.is_quick, items):
        item.add_marker(pytest.mark.quick)
    example = config.getoption("--example", None)
    for item in items if example else ():
        if hypothesis.is_hypothesis_test(item.obj):
            item.obj.hypothesis_explicit_examples = []
            hypothesis.example(**eval(f"dict({example})", vars(item.module)))(item.obj)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Prints the configuration that Hypothesis found to fail as the command that repeats it."""
    report = yield
    for note in getattr(call.excinfo and call.excinfo.value, "__notes__", ()):
        if note.startswith(("Failing", "Falsifying")):
            lines = [re.sub(r"\s+# .*", "", line).strip() for line in note.splitlines()[1:-1]]
            drawn = [line for line in lines if line.partition("=")[0] not in item.fixturenames]
            example = ["--example", " ".join(drawn).rstrip(",")]
            command = shlex.join(["python", "-m", "pytest", item.nodeid, *example])
            report.sections.append(("The failing configuration as a command", command))
    return report


@pytest.fixture(scope="session")
def randn():
    """randn(*shape, dtype, device, seed): normal values, the same for a seed on every device."""

    def make(*shape, dtype=torch.float32, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return make


@pytest.fixture(scope="session")
def poisoned():
    """A context in which new tensors hold NaN, so that what a kernel leaves out is seen."""
    return poison.poisoned


@pytest.fixture(scope="session")
def agrees():
    """agrees(out, lse, q, k, v, visible, scale): assert that (out, lse) is attention.

    The largest and the root mean square error of out against fp64 are at most twice those of
    PyTorch's eager attention in the same dtype under the same mask, plus what rounding the result
    and the scores once makes unavoidable. lse is held to fp32 rounding. k and v may hold more
    tokens than q.
    """

    def check(out, lse, q, k, v, visible, scale=None):
        __tracebackhide__ = True
        visible = visible.to(q.device)
        exact, exact_lse = reference.attention(q, k, v, visible, scale)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert lse.shape == q.shape[:-1]
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-5)
        assert out.isfinite().all()
        if exact.numel() == 0 or v.numel() == 0:
            assert out.eq(0).all()
            return
        # Scores of size s have a rounding error of s * eps, which the weights inherit. PyTorch's
        # error has it too, but with few rows it may be small by chance.
        size = 1 + exact_lse.nan_to_num(0, 0, 0).abs().max().item()
        accumulator = torch.promote_types(q.dtype, torch.float32)
        floor = 2 * torch.finfo(q.dtype).eps * exact.abs().max().item()
        floor += torch.finfo(accumulator).eps * size * v.abs().max().item()
        eager = _eager(q, k, v, visible, scale).reshape(q.shape)
        ours, theirs = (out.double() - exact).abs(), (eager.double() - exact).abs()
        for name, figure in {"largest": torch.max, "rms": _rms}.items():
            error, allowed = figure(ours).item(), 2 * figure(theirs).item() + floor
            assert error <= allowed, (
                f"{name} error {error:.3g}, {allowed:.3g} is allowed; worst at {_where(ours)} "
                f"of out {tuple(out.shape)} {out.dtype}"
            )

    return check


def _eager(q, k, v, visible, scale):
    """PyTorch's attention without fusion, in q's dtype; rows that see no key are 0."""
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    visible = visible.expand(*q.shape[:3], k.shape[2])
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=True
        )
    return out.masked_fill(~visible.any(-1, keepdim=True), 0).transpose(1, 2)


def _rms(x):
    return x.square().mean().sqrt()


def _where(error):
    return tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
