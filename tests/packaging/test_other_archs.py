"""What the architectures beside Hopper's lack: the lists of kernels, the GPU tests and the docs."""

import re

import other_archs
import pytest
from commands import ROOT

import arch_table
import kernel_list

ROWS = kernel_list.read_all()
ARCHS = sorted({row.arch.name for row in ROWS} - {"sm90"})


def kernels(arch):
    """Largest head dim by pass, skipping, bias, mechanism and dtype."""
    found = {}
    for row in ROWS:
        if row.arch.name == arch:
            biases = {row.key_bias, row.key_bias and row.direction == "forward"}
            for bias in biases:
                key = row.direction, row.skips, bias, row.mechanism, row.dtype
                found[key] = max(found.get(key, 0), row.head_dim)
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_tests_skip_exactly_what_is_lacking(arch):
    here, there = kernels("sm90"), kernels(arch)
    # Where there is no fused backward pass, the two others run.
    here = {key: head_dim for key, head_dim in here.items() if key[0] != "backward_fused"}
    lacking = {key[:3] for key, head_dim in here.items() if there.get(key, 0) < head_dim}
    assert lacking == set(other_archs.LACKING[arch])
    assert not {key for key in there if key[:3] in lacking}, "a part of it is there"


@pytest.mark.parametrize("arch", ARCHS)
def test_the_docs_say_what_is_lacking(arch):
    text = " ".join((ROOT / "docs" / "gpus.md").read_text().split())
    for what in set(other_archs.LACKING[arch].values()):
        assert what.partition(" ")[2] in text


def test_the_docs_have_every_gpu():
    """With its kernels and its status, as in core/capabilities.def."""
    table = re.findall(
        r"^SPARSE_FMHA_CAPABILITY\((\d+), (\d+), k(\w+), (\w+)\)$",
        (arch_table.CORE / "capabilities.def").read_text(),
        re.M,
    )
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "gpus.md").read_text().splitlines()
        if re.match(r"\| [^|]+ \| [\d., ]+ \| `sm", line)
    ]
    written = {
        (*capability.split("."), arch.strip("`"), status)
        for _, capabilities, arch, status, _ in cells
        for capability in capabilities.split(", ")
    }
    assert written == {(major, minor, arch.lower(), status) for major, minor, arch, status in table}


def message(arch, direction, options="", dtype="bfloat16"):
    return RuntimeError(
        f"NotImplementedError: sparse_fmha: no kernel for arch={arch}, pass={direction}, "
        f"mechanism=dense, dtype={dtype}, head_dim=64{options}, which runs on the CPU only"
    )


def test_reasons():
    assert other_archs.reason(message("sm80", "forward", ", with skipping")) == (
        "sm80 skips no key tiles"
    )
    assert other_archs.reason(message("sm80", "forward", ", with key_bias")) == (
        "sm80 takes no key_bias"
    )
    outer = AssertionError("another message was expected")
    outer.__context__ = message("sm86", "forward", ", with key_bias")
    assert other_archs.reason(outer) == "sm86 takes no key_bias"


@pytest.mark.parametrize(
    "error",
    [
        message("sm80", "forward"),
        message("sm86", "backward_dkv"),
        message("sm80", "decode"),
        message("sm90", "forward", ", with key_bias"),
        message("sm80", "forward", ", with skipping, with key_bias"),
        message("sm80", "backward_dq", dtype="float32"),
        ValueError("no"),
    ],
    ids=str,
)
def test_what_is_no_reason(error):
    assert other_archs.reason(error) is None
