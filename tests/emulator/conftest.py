"""Tests of the GPU kernels on the emulator: skipped unless its build of the package is loaded."""

import emulated
import pytest

import sparse_fmha

ARCHS = ("sm80", "sm86", "sm90")


@pytest.fixture(scope="session", autouse=True)
def emulator():
    if not emulated.is_loaded():
        pytest.skip("not the emulated build of the package; see tests/emulator/README.md")
    sparse_fmha.allow_untested()
    yield
    sparse_fmha.allow_untested(False)


@pytest.fixture(params=ARCHS)
def arch(request):
    """The architecture whose kernels calls take."""
    with sparse_fmha.arch_override(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips a test that needs a row which was not built."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        if why := emulated.why_skipped(error):
            pytest.skip(why)
        raise
