"""The demo's photograph, or the user's own picture, as a tensor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from sparse_fmha._versions import require

require("pillow", "matplotlib", by=__name__, extra="demo")

import matplotlib
from PIL import Image, ImageOps

SIDE = 256  # of the sample photograph, pixels


class InputError(ValueError):
    """The user's picture or options are invalid."""


class UnavailableError(RuntimeError):
    """This machine or installation cannot run the demo."""


def sample() -> Image.Image:
    """Grace Hopper (official portrait, United States Navy, public domain), from matplotlib."""
    path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    if not path.is_file():
        raise UnavailableError(f"{path} is missing from this matplotlib; pass --image PATH")
    with Image.open(path) as image:
        square = image.convert("RGB").crop((0, 0, 512, 512))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def load(path: Path | None, window: int, max_pixels: int, resize: int | None) -> torch.Tensor:
    """Loads a picture as [C, Y, X] in 0..1, upright; C is 1 for grayscale, else 3.

    Args:
        path: any file that Pillow reads, or None for the sample.
        window: the minimum number of pixels on either axis.
        max_pixels: the maximum total number of pixels.
        resize: shrink the longer side to this many pixels first.

    Raises:
        InputError: the file is not a picture, or its size is out of range.
    """
    name = "the sample photograph" if path is None else str(path)
    try:
        with sample() if path is None else Image.open(path) as image:
            if resize is None:  # before decoding, as it may be huge
                check_size(name, image.size, window, max_pixels)
            picture = flatten(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: too large to decode safely") from None
    except (OSError, SyntaxError) as error:
        raise InputError(f"{name}: not a picture that Pillow can read: {error}") from None
    if resize is not None:
        picture.thumbnail((resize, resize), Image.Resampling.LANCZOS)
    check_size(name, picture.size, window, max_pixels)
    pixels = torch.from_numpy(np.array(picture, np.float32) / 255)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def flatten(image: Image.Image) -> Image.Image:
    """Converts to 8-bit grayscale or RGB; transparent areas become white."""
    if image.mode.startswith("I"):  # 16 bits
        levels = (np.asarray(image, np.float64) / 257).round().clip(0, 255)
        return Image.fromarray(levels.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def check_size(name: str, size: tuple[int, int], window: int, max_pixels: int) -> None:
    width, height = size
    if min(size) < window:
        raise InputError(f"{name}: {width}x{height} pixels, less than the window {window}x{window}")
    if width * height > max_pixels:
        raise InputError(
            f"{name}: {width}x{height} is {width * height / 1e6:.2f} megapixels, the limit with a "
            f"{window}x{window} window is {max_pixels / 1e6:.2f}; "
            f"try --resize {math.isqrt(max_pixels)}"
        )


def psnr(picture: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, with both pictures clipped to the displayable range."""
    return -10 * math.log10((picture.clamp(0, 1) - truth).square().mean().item())
