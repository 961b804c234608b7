"""The transformers of diffusers that tiny_diffusion does not have."""

import tiny_images
import tiny_videos
import torch
from tiny_diffusion import sharpen

from sparse_fmha import BlockGrid

LOOSE = {"kandinsky5": 2e-3}  # it rounds q and k to bf16
MORE = {
    "ltx2": tiny_videos.ltx2,
    "minimax_h3": tiny_videos.minimax_h3,
    "flux2": tiny_images.flux2,
    "krea2": tiny_images.krea2,
    "z_image": tiny_images.z_image,
    "cosmos": tiny_videos.cosmos,
    "cosmos3": tiny_videos.cosmos3,
    "hunyuan_video_15": tiny_videos.hunyuan_video_15,
    "hunyuan_image": tiny_images.hunyuan_image,
    "kandinsky5": tiny_videos.kandinsky5,
    "kandinsky6": tiny_videos.kandinsky6,
    "framepack": tiny_videos.framepack,
    "helios": tiny_videos.helios,
    "skyreels": tiny_videos.skyreels,
    "chronoedit": tiny_videos.chronoedit,
    "wan_animate": tiny_videos.wan_animate,
    "sd3": tiny_images.sd3,
    "chroma": tiny_images.chroma,
}


def make(name, **options):
    torch.manual_seed(0)
    return sharpen(MORE[name](**options))


def close(out, expected, name=None):
    tolerance = LOOSE.get(name, 1e-4)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def differs(out, expected):
    assert (out - expected).abs().max() > 1e-2 * expected.abs().max()


def all_blocks(q, k):
    grid = BlockGrid.of(q, k, 64, 32)
    return grid.mask(grid.reachable())
