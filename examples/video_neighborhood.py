"""A video denoised by 3-D neighborhood attention, beside 2-D attention in each frame.

    python examples/video_neighborhood.py [--device cuda] [--out video.gif]

The camera pans over a photograph and every frame has noise of its own. Non-local means, as in
`python -m sparse_fmha demo`, averages what looks alike in a window around each pixel. A window that
reaches into the frames before and after finds the same things again, with other noise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import sparse_fmha
from sparse_fmha.cli import one_line_errors

with one_line_errors(install="sparse-fmha[demo]"):
    from PIL import Image, ImageDraw
    from rich.console import Console
    from rich.table import Table

    from sparse_fmha.cli import demo, photo

REPEATS = 3
SHOWN = 224  # least side of a frame in the picture, pixels
GAP = 4  # pixels between pictures
CAPTION = 14  # pixels above them


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to attend")
    p.add_argument("--frames", type=int, default=10, metavar="N")
    p.add_argument("--size", type=int, default=112, metavar="N", help="side of a frame, pixels")
    p.add_argument("--pan", type=int, default=2, metavar="N", help="pixels from frame to frame")
    p.add_argument("--window", type=int, nargs=3, default=(5, 13, 13), metavar=("T", "Y", "X"))
    p.add_argument("--sigma", type=float, default=25.0, help="noise, of a range of 0 to 255")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--out", type=Path, default=Path("video.png"), help="strip of frames, or a .gif")
    return p


def panning(frames: int, size: int, pan: int) -> torch.Tensor:
    """[F, C, Y, X] in 0..1: the camera moves to the right, and downwards half as fast."""
    picture = photo.load(None, size, sys.maxsize, None)
    height, width = picture.shape[1:]
    places = [((height - size) // 4 + f * pan // 2, f * pan) for f in range(frames)]
    if places[-1][0] + size > height or places[-1][1] + size > width:
        raise photo.InputError(
            f"--frames {frames} --pan {pan} --size {size}: the camera leaves the photograph of "
            f"{width}x{height} pixels"
        )
    return torch.stack([picture[:, y : y + size, x : x + size] for y, x in places])


def denoise(tokens: demo.Tokens, window: tuple[int, ...]) -> tuple[torch.Tensor, float]:
    """The pictures [F, C, Y, X] and the seconds of an attention call.

    With two sides the frames are a batch of grids, with three they are the first axis of one.
    """
    q, k, v = (t if len(window) == 2 else t[None] for t in (tokens.q, tokens.k, tokens.v))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        out = sparse_fmha.neighborhood_attention(q, k, v, window, scale=tokens.scale)
        if q.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    pixels = out.view(tokens.v.shape)[..., 0, : tokens.channels]
    return pixels.movedim(-1, 1).float().cpu(), statistics.median(seconds)


def picture(videos: dict[str, torch.Tensor], frame: int) -> Image.Image:
    """One frame of every video in a row, with its caption."""
    source = next(iter(videos.values())).shape[-1]
    side = source * -(-SHOWN // source)
    size = (side + GAP) * len(videos) - GAP, CAPTION + side
    row = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(row)
    for n, (name, video) in enumerate(videos.items()):
        pixels = (video[frame].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        draw.text((n * (side + GAP), 1), name, fill="black")
        enlarged = Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.NEAREST)
        row.paste(enlarged, (n * (side + GAP), CAPTION))
    return row


def write(path: Path, videos: dict[str, torch.Tensor]) -> None:
    """All frames as a GIF, or first, middle and last one below each other."""
    frames = len(next(iter(videos.values())))
    if path.suffix.lower() == ".gif":
        first, *others = (picture(videos, frame) for frame in range(frames))
        first.save(path, save_all=True, append_images=others, duration=120, loop=0)
        return
    rows = [picture(videos, frame) for frame in sorted({0, frames // 2, frames - 1})]
    strip = Image.new("RGB", (rows[0].width, (rows[0].height + GAP) * len(rows) - GAP), "white")
    for n, row in enumerate(rows):
        strip.paste(row, (0, n * (row.height + GAP)))
    strip.save(path)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise photo.UnavailableError("--device cuda: torch sees no CUDA device")
    if args.out.suffix.lower() not in (".png", ".gif"):
        raise photo.InputError(f"--out {args.out}: must end in .png or .gif")
    if not args.out.absolute().parent.is_dir():
        raise photo.InputError(f"--out {args.out}: no such folder")
    for option, least in (("frames", 1), ("size", 2), ("pan", 0), ("sigma", 1)):
        value = getattr(args, option)
        if not value >= least:
            raise photo.InputError(f"--{option} must be at least {least}, got {value:g}")
    truth = panning(args.frames, args.size, args.pan)
    generator = torch.Generator("cpu").manual_seed(args.seed)
    noise = torch.randn(truth.shape, generator=generator, device="cpu")
    videos = {"scene": truth, "noisy": truth + args.sigma / 255 * noise}
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    tokens = demo.as_tokens(videos["noisy"].to(args.device), args.sigma / 255, dtype)

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("PSNR dB", "keys", "GFLOP", "time", "GFLOP/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("noisy", f"{photo.psnr(videos['noisy'], truth):.2f}")
    elements = tokens.q.numel()  # tokens x head dim, one head
    for title, window in (("2-D, each frame", args.window[1:]), ("3-D", args.window)):
        name = f"{title}, {'x'.join(map(str, window))}"
        videos[name], seconds = denoise(tokens, tuple(window))
        keys = torch.Size(window).numel()
        gflop = 4e-9 * elements * keys
        table.add_row(
            name, f"{photo.psnr(videos[name], truth):.2f}", f"{keys:,}", f"{gflop:,.1f}",
            f"{seconds:.3g} s", f"{gflop / seconds:,.0f}",
        )  # fmt: skip
    write(args.out, videos)
    Console().print(table)
    frames, _, height, width = truth.shape
    demo.say(f"{frames} frames of {width}x{height} pixels; picture: {args.out}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
