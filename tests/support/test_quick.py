"""The choice of quick tests: what is left out is there, and every area has some."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick

TESTS = Path(__file__).resolve().parents[1]
AREAS = {path.parent.name for path in TESTS.glob("*/test_*.py")} - {"gpu"}


@pytest.mark.parametrize("file", quick.SLOW)
def test_what_is_left_out_is_there(file):
    defined = re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.MULTILINE)
    for name in quick.SLOW[file]:
        function = name.split(r"\[")[0]
        assert any(re.fullmatch(function, test) for test in defined), f"{file} has no {name}"


@pytest.mark.parametrize(
    ("file", "name", "chosen"),
    [
        ("ops/test_merge.py", "test_any", True),
        ("ops/test_symbolic.py", "test_any", False),
        ("gpu/test_fmha_gpu.py", "test_any", False),
        ("cost/test_simulate.py", "test_ranking", True),
        ("cost/test_simulate.py", "test_extension_of_another_python[x]", False),
        ("distributed/test_distributed.py", "test_case[ulysses-2]", True),
        ("distributed/test_distributed.py", "test_case[ulysses-4]", False),
    ],
)
def test_the_choice(file, name, chosen):
    item = SimpleNamespace(path=TESTS / file, name=name, originalname=name.split("[")[0])
    assert quick.is_quick(item) == chosen


def test_the_mark(request):
    assert request.node.get_closest_marker("quick")


@pytest.mark.parametrize("area", sorted(AREAS))
def test_every_area_has_quick_tests(area):
    files = {f"{area}/{path.name}" for path in (TESTS / area).glob("test_*.py")}
    assert files - {file for file, names in quick.SLOW.items() if not names}
