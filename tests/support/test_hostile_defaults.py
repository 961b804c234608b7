"""The default that only the package meets."""

import hostile_defaults
import pytest
import torch

MAKE = "def make(): return torch.zeros(3)"
HAND_ON = "def __torch_function__(): return torch.zeros(3)"


def made(file, source=MAKE):
    """What code of a file makes, under the default device meta and dtype float64."""
    names = {"torch": torch}
    exec(compile(source, file, "exec"), names)
    call = names.get("make") or names["__torch_function__"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), hostile_defaults.OthersKeepDefaults():
            return call()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("file", ["stripe_mask.py", "patterns/moa.py"])
def test_the_package_meets_it(file):
    x = made(hostile_defaults.PACKAGE + file)
    assert (x.device.type, x.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (__file__, MAKE),
        ("/elsewhere/transformers/cache.py", MAKE),
        (hostile_defaults.TORCH + "nn/init.py", MAKE),  # called by this test
        (hostile_defaults.PACKAGE + "sdpa.py", HAND_ON),
    ],
)
def test_others_do_not(file, source):
    x = made(file, source)
    assert (x.device.type, x.dtype) == ("cpu", torch.float32)
