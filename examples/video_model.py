"""A video transformer of diffusers with random weights: dense beside neighborhood attention.

    python examples/video_model.py [--device cuda] [--grid 8 24 32]

Needs `pip install diffusers`. With a trained model the lines are the same: `enable` it, or its
pipeline, and call it. The error is that of one call, relative to the dense output; random weights
look at all keys alike, trained ones mostly at what is near, so it says nothing about pictures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings

import torch

from sparse_fmha.cli import one_line_errors

with one_line_errors(install="sparse-fmha[diffusers]"):
    from diffusers import WanTransformer3DModel

    from sparse_fmha.integrations import diffusers as sparse

REPEATS = 3


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--grid", type=int, nargs=3, default=(8, 24, 32), metavar=("T", "Y", "X"))
    p.add_argument("--layers", type=int, default=2, metavar="N")
    p.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    return p


def model(layers: int, device: str) -> WanTransformer3DModel:
    """Wan with few channels; as in the real one a token is a patch of 1x2x2 latents."""
    made = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        ffn_dim=512,
        num_layers=layers,
    )
    return made.to(device).eval()


def call(transformer: WanTransformer3DModel, inputs: dict) -> tuple[torch.Tensor, float]:
    """The output, and the median seconds of a call."""
    seconds, on_cuda = [], inputs["hidden_states"].is_cuda
    for _ in range(REPEATS):
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
            out = transformer(**inputs, return_dict=False)[0]
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return out, statistics.median(seconds)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch sees no CUDA device")
    if args.layers < 1:
        raise ValueError(f"--layers must be at least 1, got {args.layers}")
    if min(args.grid) < 2:
        raise ValueError(f"--grid {' '.join(map(str, args.grid))}: at least 2 on each axis")
    torch.manual_seed(args.seed)
    transformer = model(args.layers, args.device)
    frames, height, width = args.grid
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, device="cpu"),
        "encoder_hidden_states": torch.randn(1, 32, 64, device="cpu"),
        "timestep": torch.tensor([500], device="cpu"),
    }
    inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    grid = tuple(args.grid)
    half = tuple(max(2, n // 2) for n in grid)
    quarter = tuple(max(2, n // 4) for n in grid)
    dense, seconds = call(transformer, inputs)
    print(f"{grid[0]}x{grid[1]}x{grid[2]} tokens, {args.layers} layers, {args.device}")
    print(f"{'attention':24} {'keys':>7} {'time':>9} {'rel. error':>11}")
    print(f"{'dense, torch':24} {dense[0, 0].numel() // 4:7} {seconds:7.3f} s")
    warnings.filterwarnings("ignore", message=".*nothing is left out")  # the first one is a check
    for title, window in (("whole grid", grid), ("half", half), ("quarter", quarter)):
        sparse.enable(transformer, "neighborhood", window=window, min_tokens=0)
        out, seconds = call(transformer, inputs)
        sparse.disable(transformer)
        error = ((out - dense).norm() / dense.norm()).item()
        name = f"{title}, {'x'.join(map(str, window))}"
        print(f"{name:24} {torch.Size(window).numel():7} {seconds:7.3f} s {error:11.2g}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
