"""Image denoising by attention: `python -m sparse_fmha demo`.

Non-local means (Buades, Coll, Morel, "A non-local algorithm for image denoising", CVPR 2005)
replaces every pixel by the mean of the pixels whose surrounding patches look alike, weighted by
exp(-|p_i - p_j|^2 / h^2). This is softmax attention over the pixels: a term that depends only on
the query cancels in a softmax, so the score can be (2 p_i.p_j - |p_j|^2) / h^2, a dot product.
Restricting j to a window around i, as is usual in practice, gives 2-D neighborhood attention; the
whole picture gives dense attention.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from sparse_fmha._versions import require

require("pillow", "matplotlib", "rich", by=__name__, extra="demo")

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import sparse_fmha
from sparse_fmha.cli import info, photo
from sparse_fmha.cli.photo import InputError, UnavailableError, psnr
from sparse_fmha.plotting import pictures

PATCH = 3  # side, pixels
BANDWIDTH = 0.75  # h, in units of the distance that noise puts between equal patches
SAMPLE_QUERY = 100, 133  # the pixel of the sample photograph whose window is drawn
# Limits that keep the run well under a minute on two CPU cores.
MAX_PAIRS = 8 * 10**8  # pairs of a query and a key in its window
DENSE_TOKENS = {"cpu": 2**16, "cuda": 2**20}

Call = Callable[[], Iterator[torch.Tensor]]  # yields [1, rows, X, 1, D], top to bottom
Crop = tuple[slice, slice]  # rows, columns


@dataclass
class Tokens:
    """Pictures as attention inputs, each [F, Y, X, 1, D]; F is 1 for a single picture."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    channels: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.q.shape[1], self.q.shape[2]

    def crop(self, rows: slice, columns: slice) -> Tokens:
        q, k, v = (t[:, rows, columns] for t in (self.q, self.k, self.v))
        return Tokens(q, k, v, self.scale, self.channels)


@dataclass
class Result:
    """The output of an attention call, [C, Y, X], and its cost."""

    pixels: torch.Tensor
    keys: int  # per query
    flops: float  # useful: 4 D for each visible pair
    seconds: float


def head_dim(channels: int) -> int:
    """The patch, two components for its norm, and zeros up to a multiple of 8."""
    return -(-(channels * PATCH**2 + 2) // 8) * 8


def as_tokens(noisy: torch.Tensor, sigma: float, dtype: torch.dtype) -> Tokens:
    """Makes attention inputs whose softmax weights are those of non-local means.

    Args:
        noisy: [C, Y, X], or the frames of a video, [F, C, Y, X].
        sigma: standard deviation of the noise, in the unit of `noisy`.
        dtype: dtype of the tokens.
    """
    noisy = noisy.view(-1, *noisy.shape[-3:])
    frames, channels, height, width = noisy.shape
    border = [PATCH // 2] * 4
    patches = F.unfold(F.pad(noisy, border, mode="reflect"), PATCH).mT.flatten(0, 1)
    # A shift does not change distances, and small numbers lose least in 16 bits.
    patches = (patches - patches.mean()).to(dtype)
    norm = patches.double().square().sum(1, keepdim=True) / -2
    high = norm.to(dtype)  # the norm needs more precision than 16 bits have
    low = (norm - high.double()).to(dtype)

    def tokens(*columns: torch.Tensor) -> torch.Tensor:
        rows = torch.cat(columns, 1)
        rows = F.pad(rows, (0, head_dim(channels) - rows.shape[1]))
        return rows.view(frames, height, width, 1, -1)

    one = torch.ones_like(high)
    q = tokens(patches, one, one)
    k = tokens(patches, high, low)
    v = tokens(noisy.flatten(2).mT.flatten(0, 1).to(dtype))
    # Noise moves equal patches of n values sqrt(2 n) sigma apart.
    h_squared = BANDWIDTH**2 * 2 * patches.shape[1] * sigma**2
    return Tokens(q, k, v, 2 / h_squared, channels)


def neighborhood(tokens: Tokens, window: int) -> Call:
    def call() -> Iterator[torch.Tensor]:
        yield sparse_fmha.neighborhood_attention(
            tokens.q, tokens.k, tokens.v, (window, window), scale=tokens.scale
        )

    return call


def dense(tokens: Tokens, bands: int) -> Call:
    """Attends bands of queries to all keys: the work of one call, split to show progress."""

    def call() -> Iterator[torch.Tensor]:
        k, v = tokens.k.flatten(1, 2), tokens.v.flatten(1, 2)
        for q in tokens.q.chunk(bands, dim=1):
            out = sparse_fmha.attention(q.flatten(1, 2), k, v, scale=tokens.scale)
            yield out.view(q.shape)

    return call


def measure(
    call: Call, tokens: Tokens, keys: int, repeats: int, advance: Callable[[], None]
) -> Result:
    """Runs call `repeats` times and takes the median time."""
    seconds = []
    for _ in range(repeats):
        outs = []
        start = time.perf_counter()
        try:
            for out in call():
                outs.append(out)
                advance()
            if tokens.q.is_cuda:
                torch.cuda.synchronize()
        except (RuntimeError, ValueError) as error:
            raise UnavailableError(error) from error
        seconds.append(time.perf_counter() - start)
    pixels = torch.cat(outs, 1)[0, :, :, 0, : tokens.channels].permute(2, 0, 1).float().cpu()
    flops = 4.0 * math.prod(tokens.grid) * keys * tokens.q.shape[-1]
    return Result(pixels, keys, flops, statistics.median(seconds))


def dense_region(tokens: Tokens, window: int, device: str) -> Crop:
    """The largest centred crop that dense attention is run on."""
    limit = DENSE_TOKENS[device]
    shrink = min(1.0, math.sqrt(limit / math.prod(tokens.grid)))
    width = max(window, int(tokens.grid[1] * shrink))
    height = max(window, min(int(tokens.grid[0] * shrink), limit // width))
    width = min(width, limit // height)  # a narrow picture may have kept its full height

    def middle(extent: int, size: int) -> slice:
        return slice((extent - size) // 2, (extent - size) // 2 + size)

    return middle(tokens.grid[0], height), middle(tokens.grid[1], width)


def check(out: Path, device: str, window: int, sigma: float, resize: int | None) -> int:
    """Checks the options; returns the maximum number of pixels of a picture."""
    largest = math.isqrt(math.isqrt(MAX_PAIRS))  # the smallest picture has one window
    if not 2 <= window <= largest:
        raise InputError(f"--window must be from 2 to {largest}, got {window}")
    if not 1 <= sigma <= 255:
        raise InputError(f"--sigma must be from 1 to 255, got {sigma:g}")
    if resize is not None and resize < window:
        raise InputError(f"--resize must be at least the window, {window}, got {resize}")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, got {out}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out must be in a folder that exists, got {out}")
    if out.is_dir() or not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise InputError(f"--out must be a file that can be written, got {out}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("--device cuda: torch sees no CUDA device")
    return MAX_PAIRS // window**2


def run(
    image: Path | None = None,
    out: Path = Path("demo.png"),
    device: str = "cpu",
    window: int = 21,
    sigma: float = 25.0,
    seed: int = 0,
    resize: int | None = None,
) -> dict[str, Result]:
    """Runs the whole demo; `python -m sparse_fmha demo --help` explains the options.

    Returns:
        The results by their names in the table.

    Raises:
        InputError: an invalid option or picture.
        UnavailableError: the device does not exist or has no kernel.
    """
    max_pixels = check(out, device, window, sigma, resize)
    truth = photo.load(image, window, max_pixels, resize)
    if resize is not None and max(truth.shape[1:]) < resize:
        height, width = truth.shape[1:]
        say(f"--resize {resize} changes nothing: the picture has {width}x{height} pixels")
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(truth.shape, generator=generator, dtype=torch.float32, device="cpu")
    noisy = truth + sigma / 255 * noise
    dtype = torch.float16 if device == "cuda" else torch.float32
    tokens = as_tokens(noisy.to(device), sigma / 255, dtype)
    crop = dense_region(tokens, window, device)
    part = tokens.crop(*crop)

    results: dict[str, Result] = {}
    with progress_bar() as progress:

        def step(name: str, call: Call, of: Tokens, keys: int, repeats: int, parts: int) -> None:
            task = progress.add_task(name, total=repeats * parts)
            results[name] = measure(call, of, keys, repeats, lambda: progress.advance(task))

        fast, slow = f"neighborhood {window}x{window}", "dense"
        step(fast, neighborhood(tokens, window), tokens, window**2, 3, 1)
        if part.grid != tokens.grid:
            step("neighborhood, crop", neighborhood(part, window), part, window**2, 3, 1)
            slow = "dense, crop"
        bands, repeats = (32, 1) if device == "cpu" else (1, 3)
        parts = len(part.q.chunk(bands, dim=1))
        step(slow, dense(part, bands), part, math.prod(part.grid), repeats, parts)

    show(results, truth, noisy, crop)
    try:
        for line in info.would_run():
            say(line)
    except ImportError as error:  # the ops work without the extension that lists the kernels
        say(str(error))
    canvas = torch.ones_like(truth)
    inside = (slice(None), *crop)
    canvas[inside] = results[slow].pixels
    quality = psnr(results[fast].pixels, truth), psnr(results[slow].pixels, truth[inside])
    panels = [
        pictures.Panel("input", truth),
        pictures.Panel(f"noisy, {psnr(noisy, truth):.1f} dB", noisy),
        pictures.Panel(f"{fast}, {quality[0]:.1f} dB", results[fast].pixels),
        pictures.Panel(f"{slow}, {quality[1]:.1f} dB", canvas, has_window=False),
    ]
    pictures.comparison(out, panels, window, SAMPLE_QUERY if image is None and not resize else None)
    say(f"picture: {out}")
    return results


def progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


def show(results: dict[str, Result], truth: torch.Tensor, noisy: torch.Tensor, crop: Crop) -> None:
    """Prints the table; speedups compare runs over the same tokens."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("PSNR dB", "tokens", "keys", "GFLOP", "time", "GFLOP/s", "speedup"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("noisy", f"{psnr(noisy, truth):.2f}")
    slow = list(results.values())[-1]
    for name, result in results.items():
        same = result.pixels.shape == slow.pixels.shape
        rows, columns = crop
        target = truth[:, rows, columns] if same else truth
        table.add_row(
            name,
            f"{psnr(result.pixels, target):.2f}",
            f"{math.prod(result.pixels.shape[1:]):,}",
            f"{result.keys:,}",
            f"{result.flops / 1e9:,.1f}",
            f"{result.seconds:.3g} s",
            f"{result.flops / result.seconds / 1e9:,.0f}",
            f"{slow.seconds / result.seconds:.1f}x" if same else "",
        )
    Console(width=max(Console().width, 90)).print(table)
    say("keys: what a query sees. GFLOP: useful ones, 4 x head dim for each query and key it sees.")
    if slow.pixels.shape != truth.shape:
        height, width = slow.pixels.shape[1:]
        say(f"crop: {width}x{height} pixels in the centre; dense attention of all takes too long.")
