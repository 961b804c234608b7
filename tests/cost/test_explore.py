"""The page of `explore`: its tables token by token, and what a browser makes of them."""

import itertools
import json
import re
import shutil
import subprocess
import types

import pytest
import torch

import sparse_fmha
from sparse_fmha import reference

CASES = [
    ((23,), {"window": 7}),
    ((24,), {"window": 7, "stride": 3, "causal": True}),
    ((9, 14), {"window": (3, 6), "stride": (1, 2), "dilation": (2, 1)}),
    ((5, 6, 9), {"window": (2, 3, 3), "dilation": (1, 2, 3), "causal": (True, False, False)}),
]


def problems(page):
    (found,) = re.findall(r"^const PROBLEMS = (.*);$", page.read_text(), re.MULTILINE)
    return json.loads(found)


def kinds(axis):
    """Bool [tokens, keys] that are seen, and [rows, columns] 0, 1 or 2; of one axis."""
    length, d = len(axis["windows"]), axis["dilation"]
    seen = torch.zeros(length, length, dtype=torch.bool)
    for q, k in itertools.product(range(length), repeat=2):
        begin, end = axis["windows"][q]
        seen[q, k] = k % d == q % d and begin <= k // d < end
    tiles = torch.zeros(len(axis["rows"]), axis["columns"], dtype=torch.int)
    for row, (first, count, full, fulls) in enumerate(axis["rows"]):
        tiles[row, first : first + count] = 1
        assert first <= full
        assert full + fulls <= first + count
        tiles[row, full : full + fulls] = 2
    return seen, tiles


@pytest.mark.parametrize(("grid", "options"), CASES, ids=str)
def test_tables_are_the_definition(tmp_path, grid, options):
    tile = {1: 4, 2: (2, 4), 3: (2, 2, 3)}[len(grid)]
    page = sparse_fmha.explore(
        grid, **options, tile_q=tile, tile_k=tile, out=tmp_path / "page.html"
    )
    (problem,) = problems(page)
    lengths = problem["grid"]
    visible = torch.ones(1, 1, dtype=torch.bool)
    for axis, length in zip(problem["axes"], lengths, strict=True):
        seen, tiles = kinds(axis)
        visible = torch.kron(visible.int(), seen.int()).bool()
        rows, columns = torch.tensor(axis["row_of"]), torch.tensor(axis["column_of"])
        of_pair = tiles[rows][:, columns]
        assert not (seen & (of_pair == 0)).any()
        assert seen[of_pair == 2].all()
        for row, column in itertools.product(range(tiles.shape[0]), range(tiles.shape[1])):
            pairs = seen[rows == row][:, columns == column]
            assert pairs.numel() > 0
            assert not (pairs.all() and tiles[row, column] == 0)
        assert len(axis["windows"]) == length
    names = ("window", "stride", "dilation", "causal")
    given = [options.get(name, d) for name, d in zip(names, (0, 1, 1, False), strict=True)]
    assert visible.equal(reference.neighborhood_mask(grid, *given))


def test_a_page_is_small_and_alone(tmp_path):
    others = {
        "<b>flux</b>": {"grid": (256, 256), "window": (80, 80), "stride": (16, 16), "source": "x"}
    }
    page = sparse_fmha.explore(
        (30, 48, 80), (18, 24, 24), stride=(16, 8, 8), others=others, out=tmp_path / "page.html"
    )
    text = page.read_text()
    assert len(text) < 100_000
    assert not re.search(r"https?:|src=|@import|<link", text)
    assert text.count("</script>") == 1
    assert [each["title"] for each in problems(page)] == [
        "grid 30x48x80, window 18x24x24, stride 16x8x8", "<b>flux</b>",
    ]  # fmt: skip
    assert "speedup" not in problems(page)[0]["source"]


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (ValueError, "grid must have at most 4194304 pairs of tiles", {"tile_q": 1, "tile_k": 1}),
        (ValueError, "window", {"window": 99}),
        (TypeError, "others must be a mapping", {"others": [{"grid": 8, "window": 3}]}),
        (TypeError, "tile_w", {"others": {"a": {"grid": 8, "window": 3, "tile_w": 1}}}),
    ],
)
def test_arguments(tmp_path, error, match, given):
    given = {"grid": (64, 64), "window": (40, 40), **given}
    with pytest.raises(error, match=match):
        sparse_fmha.explore(**given, out=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


class Run:
    """What `integrations.diffusers.record` yields."""

    layers = (types.SimpleNamespace(name="0"), types.SimpleNamespace(name="<1>"))
    density = torch.tensor([[0.25, 0.5, 1 / 3], [1.0, 1.0, 1.0]], dtype=torch.float64)
    error = torch.tensor([[0.125, 0.0, 0.25], [0.0, 0.0, 0.0]], dtype=torch.float64)


def test_a_recorded_run_is_in_the_page(tmp_path):
    page = sparse_fmha.explore((9, 14), (3, 6), recording=Run(), out=tmp_path / "page.html")
    (found,) = re.findall(r"^const RUN = (.*);$", page.read_text(), re.MULTILINE)
    assert json.loads(found) == {
        "layers": ["0", "<1>"],
        "density": [[0.25, 0.5, 0.3333], [1.0, 1.0, 1.0]],
        "error": [[0.125, 0.0, 0.25], [0.0, 0.0, 0.0]],
    }
    assert "<1>" not in page.read_text()
    page = sparse_fmha.explore((9, 14), (3, 6), out=tmp_path / "page.html")
    assert "const RUN = null;" in page.read_text()


def test_a_browser_shows_the_middle_of_the_grid(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    page = sparse_fmha.explore((9, 14), (3, 6), recording=Run(), out=tmp_path / "page.html")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    words = re.sub(r"<[^>]+>", " ", done.stdout[done.stdout.index('<table id="text"') :])
    assert "row 4 3 to 5: 3" in re.sub(r"\s+", " ", words)
    assert "column 7 4 to 9: 6" in re.sub(r"\s+", " ", words)
    assert "18 of 126; its tile visits" in words
    assert "layer 0, head 0: 25.0% of all pairs, error 12.5%" in words
    assert "0 36.1% 25.0% 50.0% 12.5% 0.0% 25.0%" in re.sub(r"\s+", " ", words)
