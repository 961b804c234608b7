"""GPU tests with another architecture's kernels: SPARSE_FMHA_TEST_ARCH=sm80 (or sm86) pytest ...

What such an architecture lacks is in LACKING; a test that needs it is skipped. Any other kernel
that is missing fails the test. tests/packaging/test_other_archs.py holds LACKING to the rows.
"""

import contextlib
import os
import re

import emulated
import torch

import sparse_fmha

VARIABLE = "SPARSE_FMHA_TEST_ARCH"
# Pass, whether key tiles are skipped, and whether keys have biases; for each mechanism, dtype and
# head dim.
LACKING = {
    arch: {
        ("forward", True, False): "skips no key tiles",
        ("forward", False, True): "takes no key_bias",
        ("backward_dq", False, True): "takes no key_bias",
        ("backward_dkv", False, True): "takes no key_bias",
    }
    for arch in ("sm80", "sm86")
}
ONE_WIDTH = "takes no values of another head dim than q's"
MISSING = re.compile(
    r"no kernel for arch=(?P<arch>\w+), pass=(?P<direction>\w+), mechanism=\w+, "
    r"dtype=b?float16, head_dim=\d+(?P<values>, value_dim=\d+)?"
    r"(?P<skips>, with skipping)?(?P<bias>, with key_bias)?"
)


@contextlib.contextmanager
def chosen():
    """Overrides the architecture if the variable asks for it."""
    with contextlib.ExitStack() as stack:
        if arch := os.environ.get(VARIABLE):
            stack.enter_context(sparse_fmha.arch_override(arch))
        yield


def in_use():
    """The architecture whose kernels calls take."""
    from sparse_fmha import _C

    of = emulated.CAPABILITY if emulated.is_loaded() else torch.cuda.get_device_capability()
    return _C.arch_for_call(*of)


def reason(error):
    """Why a test that ended with an error is skipped; None if it is not."""
    while error is not None:
        found = MISSING.search(str(error))
        if found:
            key = found["direction"], bool(found["skips"]), bool(found["bias"])
            lacking = LACKING.get(found["arch"], {})
            what = ONE_WIDTH if lacking and found["values"] else lacking.get(key)
            if what:
                return f"{found['arch']} {what}"
        error = error.__cause__ or error.__context__
    return None
