"""The check that no tensor is made without its device."""

import pytest

import check_factories

NAMES = sorted(check_factories.FACTORIES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["x = torch.{}(3)", "def f():\n    return [torch.{}(3, dtype=d)]"])
def test_a_call_without_device_is_found(name, form):
    source = form.format(name)
    assert list(check_factories.problems(source)) == [
        (source.count("\n") + 1, f"torch.{name} has no device=")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_call_with_device_is_not(name):
    for arguments in ("3, device=d", "3, **options"):
        assert not list(check_factories.problems(f"torch.{name}({arguments})"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torch.Generator()", "torch.Generator has no device"),
        ("map(torch.arange, sizes)", "torch.arange is handed on without device="),
        ("from torch import Tensor, zeros", "zeros is imported; call torch.zeros"),
    ],
)
def test_other_ways_around_it(source, message):
    assert list(check_factories.problems(source)) == [(1, message)]


@pytest.mark.parametrize(
    "source",
    [
        "torch.Generator('cpu')",
        "torch.Generator(device=d)",
        "partial(torch.zeros, device=d)",
        "torch.zeros_like(x), x.new_zeros(3), numpy.zeros(3), torch.from_numpy(x)",
    ],
)
def test_what_is_allowed(source):
    assert not list(check_factories.problems(source))


def test_files_and_lines_are_named(tmp_path):
    path = tmp_path / "part" / "made.py"
    path.parent.mkdir()
    path.write_text("import torch\n\nx = torch.eye(\n    3\n)\n")
    assert check_factories.check([tmp_path]) == [f"{path}:3: torch.eye has no device="]
