"""The model of several GPUs: its tables in the docs, and the run that it is made from."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.studies import scaling_model as model  # noqa: E402


def test_docs_have_the_tables():
    """If not: python -m benchmarks.studies.scaling_model --write."""
    page = model.PAGE.read_text()
    assert model.written(page, model.tables(model.Rates.of(model.newest()))) == page
    assert "not measured" in page.partition(model.BEGIN)[0].rpartition("\n## ")[2]


def test_agrees_with_what_was_measured():
    found = model.checks(model.newest())
    assert len(found) >= 6
    for op, way, calculated, measured in found:
        assert calculated == pytest.approx(measured, rel=0.1), (op, way)


def test_bytes():
    """Of 8 ranks with 128 tokens each, as counted in the tests of what is sent."""
    one = 128 * model.HEAD_DIM * model.ITEM
    assert model.of_ulysses(8, 128) == one * (2 * 32 + 2 * 8) * 7 / 8
    assert model.of_keys(8, 128, 4) == one * 2 * 4 * 7


def test_keys_are_hidden_until_a_message_takes_longer_than_a_step():
    alone = model.in_steps(8.0, 0.0, 8, 0)
    assert alone == pytest.approx(8.0)
    assert model.in_steps(8.0, 6.9, 8, 0) == pytest.approx(8.0)
    assert model.in_steps(8.0, 70.0, 8, 0) == pytest.approx(71.0)
    assert model.in_steps(8.0, 70.0, 1, 0) == 8.0
