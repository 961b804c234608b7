"""`sparse-fmha explore`."""

from sparse_fmha import cli


def run(capsys, *arguments):
    status = cli.main(["explore", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_a_page_with_presets(capsys, tmp_path):
    page = tmp_path / "page.html"
    arguments = ("--grid", "12x16", "--window", "5x6", "--stride", "1x2", "--out", page)
    assert run(capsys, *arguments) == (0, f"page: {page}\n", "")
    text = page.read_text()
    assert "grid 12x16, window 5x6, stride 1x2" in text
    for name in ("gna-hunyuanvideo", "gna-flux-4k", "sta-hunyuanvideo"):
        assert f'"preset {name}"' in text
    assert len(text) < 1_000_000


def test_bad_input(capsys, tmp_path):
    status, out, error = run(
        capsys, "--grid", "12x16", "--window", "50", "--out", tmp_path / "page.html"
    )
    assert (status, out) == (2, "")
    assert error.startswith("error: window")
    assert error.count("\n") == 1
