"""The demo computes what it says: Gaussian non-local means, on pictures of every kind."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_fmha.cli import demo, photo

SIGMA = 25 / 255


def noisy_crop(height, width, channels=3):
    """A textured part of the sample photograph, with noise, [C, Y, X]."""
    pixels = np.asarray(photo.sample(), np.float32)[80 : 80 + height, 90 : 90 + width] / 255
    truth = torch.from_numpy(pixels).permute(2, 0, 1)[:channels]
    return truth + SIGMA * torch.randn(truth.shape, generator=torch.Generator().manual_seed(3))


def nonlocal_means(noisy, window):
    """By the definition, a pixel at a time, in fp64; windows shift at the border."""
    noisy = noisy.double().numpy()
    channels, height, width = noisy.shape
    padded = np.pad(noisy, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    h_squared = (0.75 * SIGMA) ** 2 * 2 * 9 * channels
    out = np.empty_like(noisy)
    for y in range(height):
        for x in range(width):
            top = min(max(y - window[0] // 2, 0), height - window[0])
            left = min(max(x - window[1] // 2, 0), width - window[1])
            patch = padded[:, y : y + 3, x : x + 3]
            total, weights = np.zeros(channels), 0.0
            for j in range(top, top + window[0]):
                for i in range(left, left + window[1]):
                    distance = ((patch - padded[:, j : j + 3, i : i + 3]) ** 2).sum()
                    weight = math.exp(-distance / h_squared)
                    total += weight * noisy[:, j, i]
                    weights += weight
            out[:, y, x] = total / weights
    return out


def pixels_of(call, tokens):
    return demo.measure(call, tokens, keys=1, repeats=1, advance=lambda: None).pixels.numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-5)])
def test_neighborhood_is_nonlocal_means(channels, dtype, tolerance):
    noisy = noisy_crop(19, 26, channels)
    tokens = demo.as_tokens(noisy.to(dtype), SIGMA, dtype)
    got = pixels_of(demo.neighborhood(tokens, 7), tokens)
    np.testing.assert_allclose(got, nonlocal_means(noisy, (7, 7)), atol=tolerance)


@pytest.mark.parametrize("bands", [1, 5])
def test_dense_is_nonlocal_means_over_all_pixels(bands):
    noisy = noisy_crop(13, 17)
    tokens = demo.as_tokens(noisy, SIGMA, torch.float32)
    got = pixels_of(demo.dense(tokens, bands), tokens)
    np.testing.assert_allclose(got, nonlocal_means(noisy, (13, 17)), atol=2e-5)


def test_window_over_everything_is_dense():
    tokens = demo.as_tokens(noisy_crop(33, 33), SIGMA, torch.float32)
    near = pixels_of(demo.neighborhood(tokens, 33), tokens)
    np.testing.assert_allclose(near, pixels_of(demo.dense(tokens, 4), tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tokens_keep_the_distances(dtype):
    """Rounding the patches is fine, rounding their norm is not: it is as large as the logits."""
    tokens = demo.as_tokens(noisy_crop(24, 24), SIGMA, dtype)
    q, k = (t.double().flatten(0, 3) for t in (tokens.q, tokens.k))
    patches = q[:, :27]
    logits = tokens.scale * (q @ k.T)
    exact = -0.5 * tokens.scale * torch.cdist(patches, patches).square()
    per_query = (logits - exact).diagonal()[:, None]
    assert (logits - exact - per_query).abs().max() < 5e-3


def test_frames_are_pictures_of_one_shift():
    """What is the same in two frames has the same tokens; each frame alone is as a picture."""
    pictures = noisy_crop(12, 15).repeat(2, 1, 1, 1)
    pictures[1, :, :, 8:] = 1
    tokens = demo.as_tokens(pictures, SIGMA, torch.float64)
    assert tokens.q.shape == (2, 12, 15, 1, 32)
    assert torch.equal(tokens.q[0, :, :7], tokens.q[1, :, :7])
    outs = torch.cat(list(demo.neighborhood(tokens, 5)()))
    for picture, out in zip(pictures, outs, strict=True):
        alone = demo.as_tokens(picture, SIGMA, torch.float64)
        want = pixels_of(demo.neighborhood(alone, 5), alone)
        np.testing.assert_allclose(out[..., 0, :3].movedim(-1, 0), want, atol=1e-6)


def test_video_example(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "video_neighborhood.py"
    spec = importlib.util.spec_from_file_location("video_neighborhood", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    small = ["--frames", "5", "--size", "48", "--window", "5", "9", "9"]
    assert example.main([*small, "--out", str(tmp_path / "a.gif")]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 5
    assert example.main([*small, "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (4 * 240 + 3 * 4, 3 * (240 + 14) + 2 * 4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    noisy, flat, deep = (
        next(float(row[at]) for row in rows if row and row[0].startswith(name))
        for name, at in (("noisy", 1), ("2-D", 4), ("3-D", 2))
    )
    assert noisy + 3 < flat + 0.3 < deep


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo.png"
    return demo.run(out=out, resize=96), out


def test_denoises_the_photograph(small_run):
    results, _ = small_run
    truth = photo.load(None, 21, 10**6, 96)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    before = photo.psnr(truth + SIGMA * noise, truth)
    after = photo.psnr(results["neighborhood 21x21"].pixels, truth)
    assert 20 < before < 22
    assert after > before + 4
    assert results["dense"].flops / results["neighborhood 21x21"].flops == pytest.approx(
        96 * 96 / 441
    )


def test_writes_the_picture_with_the_window(small_run):
    _, out = small_run
    with Image.open(out) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    accent = (abs(pixels - (255, 127, 14)) < 24).all(-1)
    columns = np.nonzero(accent.any(0))[0] * 4 // pixels.shape[1]
    assert set(columns) == {0, 1, 2}, "a window in every picture but the dense one"


def test_seed_decides_the_noise(tmp_path):
    def run(seed):
        results = demo.run(out=tmp_path / "a.png", window=5, resize=40, seed=seed)
        return results["neighborhood 5x5"].pixels

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.allclose(first, run(2), atol=1e-2)


def test_dense_falls_back_to_a_stated_crop(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.DENSE_TOKENS, "cpu", 30 * 30)
    results = demo.run(out=tmp_path / "a.png", window=9, resize=60)
    assert list(results) == ["neighborhood 9x9", "neighborhood, crop", "dense, crop"]
    assert results["neighborhood 9x9"].pixels.shape == (3, 60, 60)
    assert "crop: 30x30 pixels in the centre" in capsys.readouterr().out

    truth = photo.load(None, 9, 10**6, 60)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    tokens = demo.as_tokens(truth + SIGMA * noise, SIGMA, torch.float64)
    middle = (0, slice(15, 45), slice(15, 45), 0)
    q, k, v = (t[middle].flatten(0, 1) for t in (tokens.q, tokens.k, tokens.v))
    expected = (tokens.scale * q @ k.T).softmax(1) @ v[:, :3]
    got = results["dense, crop"].pixels.flatten(1).T.double()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((256, 256), (256, 256)),
        ((1024, 1024), (256, 256)),
        ((21, 80000), (21, 3120)),
        ((80000, 21), (3120, 21)),
        ((30, 2000), (30, 2000)),
    ],
)
def test_dense_region_is_within_the_limit(grid, expected):
    token = torch.zeros(1).expand(1, *grid, 1, 32)
    tokens = demo.Tokens(token, token, token, 1.0, 3)
    rows, columns = demo.dense_region(tokens, 21, "cpu")
    assert tokens.crop(rows, columns).grid == expected
    assert abs(rows.start - (grid[0] - rows.stop)) <= 1
    assert abs(columns.start - (grid[1] - columns.stop)) <= 1


# Pictures of every kind. The left half is darker than the right half.


def halves(mode, left, right, size=(12, 8)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "left", "right"),
    [
        (halves("L", 51, 204), "png", [0.2], [0.8]),
        (halves("1", 0, 1), "png", [0], [1]),
        (halves("I;16", 13107, 52428), "png", [0.2], [0.8]),
        (halves("RGB", (51, 0, 0), (204, 255, 0)), "png", [0.2, 0, 0], [0.8, 1, 0]),
        (halves("RGB", (51, 0, 0), (204, 255, 0)).quantize(2), "gif", [0.2, 0, 0], [0.8, 1, 0]),
        (halves("RGBA", (51, 0, 0, 0), (204, 255, 0, 255)), "png", [1, 1, 1], [0.8, 1, 0]),
        (halves("LA", (51, 255), (204, 0)), "png", [0.2] * 3, [1, 1, 1]),
        (halves("CMYK", (0, 0, 0, 204), (0, 0, 0, 51)), "tiff", [0.2] * 3, [0.8] * 3),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_reads_every_kind_of_picture(tmp_path, image, suffix, left, right):
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    pixels = photo.load(path, 2, 10**6, None)
    assert pixels.shape == (len(left), 8, 12)
    for half, expected in ((pixels[:, :, :6], left), (pixels[:, :, 6:], right)):
        want = torch.tensor(expected, dtype=torch.float32)[:, None, None].expand_as(half)
        torch.testing.assert_close(half, want, atol=0.01, rtol=0)


def test_turns_a_picture_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    image = halves("L", 0, 255)
    image.save(tmp_path / "a.png", exif=exif)
    pixels = photo.load(tmp_path / "a.png", 2, 10**6, None)
    assert pixels.shape == (1, 12, 8)
    assert pixels[0, :6].max() == 0
    assert pixels[0, 6:].min() == 1


def test_resize_keeps_the_aspect(tmp_path):
    halves("L", 0, 255, (400, 100)).save(tmp_path / "a.png")
    pixels = photo.load(tmp_path / "a.png", 2, 40 * 10, 40)
    assert pixels.shape == (1, 10, 40)
    assert pixels[0, :, :15].max() < 0.1
    assert pixels[0, :, 25:].min() > 0.9
