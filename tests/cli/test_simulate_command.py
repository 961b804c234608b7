"""`sparse-fmha simulate` and the plots."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from sparse_fmha import _C, cli, simulate
from sparse_fmha._versions import FLOORS
from sparse_fmha.plotting import tiles

HUNYUAN = ["--grid", "30x48x80", "--window", "18x24x24"]


def output(capsys, *arguments):
    assert cli.main(["simulate", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def error_of(capsys, *arguments):
    status = cli.main(["simulate", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    return status, printed.err


def test_as_a_command():
    tiles = ["--tile-q", "4x8x8", "--tile-k", "2x8x8", "--static", "--heads", "24"]
    command = [sys.executable, "-m", "sparse_fmha", "simulate", *HUNYUAN, *tiles]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = simulate(
        (30, 48, 80), (18, 24, 24), tile_q=(4, 8, 8), tile_k=(2, 8, 8), key_tiling="static",
        heads=24,
    )  # fmt: skip
    assert done.stdout == f"{found}\n"
    assert "3.27x by the worst query tile" in done.stdout


def test_every_option(capsys):
    arguments = "--grid 20x30 --window 5x7 --stride 2x3 --dilation 2 --causal 0x1 --heads 3"
    arguments += " --batch 2 --head-dim 40 --extra 9 --tile-q 8x16 --tile-k 4x4"
    found = simulate(
        (20, 30), (5, 7), stride=(2, 3), dilation=2, causal=(False, True), heads=3, batch=2,
        head_dim=40, extra=9, tile_q=(8, 16), tile_k=4,
    )  # fmt: skip
    assert output(capsys, *arguments.split()) == f"{found}\n"
    one_axis = simulate(128, 16, causal=True)
    assert output(capsys, *["--grid", "128", "--window", "16", "--causal", "1"]) == f"{one_axis}\n"


def test_table(capsys):
    lines = output(capsys, *HUNYUAN, "--all", 4).splitlines()
    best = simulate((30, 48, 80), (18, 24, 24))
    heading, first, *others = lines[:5]
    assert heading.split() == (
        ["queries", "keys", "query", "tiles", "visited", "worst", "full", "executed", "bound", "ms"]
    )
    assert first.split()[:2] == ["x".join(map(str, tile)) for tile in (best.tile_q, best.tile_k)]
    assert first.split()[3:5] == [f"{best.visited.mean:.2f}", f"{best.visited.worst}"]
    assert len(others) == 3
    assert lines[5].startswith("visited, full: key tiles for each query tile, dynamic.")
    assert len(output(capsys, *HUNYUAN, "--all").splitlines()) == 12
    lines = output(capsys, *HUNYUAN, "--all", 3, "--tile-k", "1x4x32").splitlines()
    assert {line.split()[1] for line in lines[1:4]} == {"1x4x32"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*HUNYUAN, "--stride", "20x1x1"], "stride[0] must be from 1 to window[0] = 18, got 20"),
        (
            ["--grid", "30xx80", "--window", "8"],
            "--grid must be numbers such as 30x48x80, got '30xx80'",
        ),
        (
            ["--grid", "8x8", "--window", "3x3x3"],
            "window must have one entry for each of q's 2 token axes, got (3, 3, 3)",
        ),
        (
            [*HUNYUAN, "--causal", "0x2x0"],
            "--causal must be 0 or 1 for each axis, such as 0x0x1, got '0x2x0'",
        ),
        ([*HUNYUAN, "--head-dim", "12"], "head_dim must be a multiple of 8 from 8 to 256, got 12"),
        ([*HUNYUAN, "--all", "0"], "--all must be at least 1, got 0"),
        ([*HUNYUAN, "--query", "1x2x3"], "--query must be given with --plot"),
        ([*HUNYUAN, "--plot", "a.pdf"], "path must end in .png, got a.pdf"),
        ([*HUNYUAN, "--plot", "no/such/a.png"], "no/such/a.png"),
        (
            [*HUNYUAN, "--plot", "a.png", "--query", "1x48x3"],
            "query[1] must be from 0 to 47, got 48",
        ),
        (
            [*HUNYUAN, "--plot", "a.png", "--query", "5"],
            "query must have one entry for each of q's 3 token axes, got (5,)",
        ),
    ],
)
def test_errors(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, message = error_of(capsys, *arguments)
    assert status == 2
    assert words in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "option"), [("matplotlib", "--plot=a.png"), ("rich", "--all")])
def test_missing_package(module, option):
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from sparse_fmha.cli import main\n"
        f"sys.exit(main(['simulate', '--grid=8x8', '--window=3', {option!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {option.partition('=')[0]} needs {module} >= {FLOORS[module]}, which is not "
        "installed: pip install 'sparse-fmha[demo]'\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grid", "6x20x20", "--window", "3x9x9"],
        ["--grid", "64x64", "--window", "9", "--query", "0x63"],
        ["--grid", "4096", "--window", "512", "--causal", "1"],
    ],
)
def test_plot(capsys, tmp_path, arguments):
    path = tmp_path / "a.png"
    assert f"picture: {path}" in output(capsys, *arguments, "--plot", path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        colors, counts = np.unique(
            np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0, return_counts=True
        )
    assert (counts > 200).sum() >= 4, "paper, tiles, bars"
    assert any(np.ptp(color) > 60 for color in colors[counts > 200]), "all gray"


def drawn(simulation, query=None):
    """[(title, {color: rectangles as (left, top, right, bottom)})] of the panels, and the axes of
    the distribution."""
    figure = tiles.figure(simulation._view(query))
    *panels, histogram = figure.axes
    found = []
    for panel in panels:
        boxes = {}
        for collection in panel.collections:
            extents = [path.get_extents().extents.tolist() for path in collection.get_paths()]
            boxes[to_rgba(collection.get_edgecolor()[0]) if extents else None] = extents
        found.append(
            (
                panel.get_title(),
                boxes.get(to_rgba(tiles.FULL), []),
                boxes.get(to_rgba(tiles.PARTIAL), []),
                panel.images,
            )
        )
    return found, histogram


@pytest.mark.parametrize("static", [False, True])
def test_rectangles_are_the_walk(static):
    """2-D: one rectangle for each tile visited, where the walk has it."""
    key_tiling = "static" if static else "dynamic"
    found = simulate((40, 48), (17, 16), tile_q=(4, 4), tile_k=(4, 8), key_tiling=key_tiling)
    problem = (1, 40, 48), (1, 17, 16), (1, 1, 1), (1, 1, 1), (0, 0, 0)
    shape = (1, 4, 4), (1, 4, 8)
    index = 5 * 12 + 5  # of the query tile at (20, 20)
    partial, full, origins = _C.walks.Neighborhood(*problem, *shape).walk(index)
    ((_, full_boxes, partial_boxes, images),), _ = drawn(found, (20, 20))
    if not static:
        corners = [(x - 0.5, y - 0.5, x + 7.5, y + 3.5) for _, y, x in origins]
        assert sorted(map(tuple, partial_boxes)) == sorted(corners[:partial])
        assert sorted(map(tuple, full_boxes)) == sorted(corners[partial:])
        assert full > 0
    else:
        # Its queries see rows 12 to 31, all of them 15 to 28, and columns 12 to 30, 15 to 27.
        corners = {
            (x - 0.5, y - 0.5, x + 7.5, y + 3.5) for y in range(12, 32, 4) for x in (8, 16, 24)
        }
        inner = {(15.5, y - 0.5, 23.5, y + 3.5) for y in (16, 20, 24)}
        assert set(map(tuple, full_boxes)) == inner
        assert set(map(tuple, partial_boxes)) == corners - inner
        assert len(full_boxes) + len(partial_boxes) == 15
    (image,) = images
    kinds = image.get_array()
    seen = np.argwhere(np.ma.filled(kinds, tiles.UNSEEN) != tiles.UNSEEN)
    left, _, _, top = (round(end + 0.5) for end in image.get_extent())
    assert (seen.min(0) + np.array([top, left])).tolist() == [12, 12]
    assert (seen.max(0) + np.array([top, left])).tolist() == [28, 27]
    assert len(seen) == 17 * 16
    assert (kinds == tiles.WHOLE).sum() == 4 * 8 * len(full_boxes)
    legend = {p.get_label(): p.get_facecolor() for p in tiles.legend()[:3]}
    colors = [image.cmap(kind) for kind in (tiles.WHOLE, tiles.SEEN, tiles.UNSEEN)]
    assert list(legend.values()) == colors


@pytest.mark.parametrize(
    ("grid", "query", "dilation", "expected"),
    [
        ((40, 48), (21, 46), 1, [(43.5, 19.5, 47.5, 23.5)]),
        ((40, 48), (39, 0), 1, [(-0.5, 35.5, 3.5, 39.5)]),
        # Position 3 of residue 1 of 10, in the tile of 0 to 3; 5 of residue 2 of 12.
        ((20, 36), (7, 17), (2, 3), [(13.5, 0.5, 23.5, 7.5)]),
    ],
)
def test_the_query_tile_is_drawn(grid, query, dilation, expected):
    found = simulate(grid, 5, dilation=dilation, tile_q=(4, 4), tile_k=(4, 8))
    figure = tiles.figure(found._view(query))
    patches = [p for p in figure.axes[0].patches if p.get_edgecolor() == to_rgba(tiles.QUERY)]
    assert [tuple(p.get_bbox().extents) for p in patches] == expected
    title = figure.subfigs[0].get_suptitle()
    assert title.startswith(f"grid {grid[0]}x{grid[1]}, window 5x5")
    assert title.endswith(f"the query at {query[0]}x{query[1]}")


def test_the_query_tile_is_in_its_slabs_only():
    found = simulate((9, 12, 12), (5, 4, 4), stride=(1, 4, 4), tile_q=(1, 4, 4), tile_k=(2, 4, 4))
    *panels, _ = tiles.figure(found._view((4, 6, 6))).axes
    edges = [[p.get_edgecolor() for p in panel.patches] for panel in panels]
    assert [to_rgba(tiles.QUERY) in of_panel for of_panel in edges] == [False, True, False]


def test_one_number_of_tiles_is_a_narrow_bar():
    found = simulate(4096, 512, stride=512)
    assert len(found.distribution) == 1
    histogram = tiles.figure(found._view()).axes[-1]
    (bar,) = histogram.patches
    left, right = histogram.get_xlim()
    assert bar.get_width() < (right - left) / 10
    assert left <= bar.get_x()
    assert histogram.get_title()


def test_slices_of_time():
    found = simulate((9, 12, 12), (5, 4, 4), stride=(1, 4, 4), tile_q=(1, 4, 4), tile_k=(2, 4, 4))
    panels, _ = drawn(found, (4, 6, 6))
    assert [title for title, *_ in panels] == ["T 2 to 3", "T 4 to 5", "T 6 to 7"]
    counts = [(len(full), len(partial)) for _, full, partial, _ in panels]
    assert counts == [(1, 0), (1, 0), (0, 1)]
    assert all(len(images) == 1 for *_, images in panels)


def test_dilation_leaves_gaps():
    found = simulate((20, 21), (3, 4), dilation=(2, 5), tile_q=(2, 2), tile_k=(2, 2))
    ((_, full, partial, images),), _ = drawn(found, (10, 11))
    # Row 10 is position 5 of residue 0, in the tile of 4 and 5, which sees 3 to 6; column 11 is
    # position 2 of residue 1, and all four of its class are seen.
    boxes = [(x - 0.5, y - 0.5, x + 5.5, y + 2.5) for y in (6, 10) for x in (1, 11)]
    assert sorted(map(tuple, full + partial)) == sorted(boxes)
    (image,) = images
    kinds = image.get_array()
    assert kinds.shape == (7, 16)  # rows 6 to 12, columns 1 to 16
    own = ~np.ma.getmaskarray(kinds)  # of the residue, in some tile
    assert [axis.tolist() for axis in np.nonzero(own.any(1))] == [[0, 2, 4, 6]]
    assert [axis.tolist() for axis in np.nonzero(own.any(0))] == [[0, 5, 10, 15]]
    seen = np.ma.filled(kinds, tiles.UNSEEN) != tiles.UNSEEN
    assert [axis.tolist() for axis in np.nonzero(seen.any(1))] == [[2, 4, 6]]


def test_distribution_is_drawn():
    found = simulate((64, 64), 9, tile_q=(8, 16), tile_k=(2, 4))
    _, histogram = drawn(found)
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in histogram.patches}
    assert bars == found.distribution
    assert len(bars) > 1


def test_query_and_path_are_checked(tmp_path):
    found = simulate((8, 8), 3)
    with pytest.raises(ValueError, match=r"query\[1\] must be from 0 to 7, got 8"):
        found.plot(tmp_path / "a.png", (0, 8))
    with pytest.raises(ValueError, match=r"must end in \.png"):
        found.plot(tmp_path / "a")
