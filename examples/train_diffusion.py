"""A small diffusion transformer trained on a photograph with three attentions from one seed.

    python examples/train_diffusion.py [--out curves.png]       # on a CPU in under a minute
    python examples/train_diffusion.py --device cuda            # a larger model

Needs `pip install sparse-fmha[demo]`. The model learns to remove noise (rectified flow) from crops
of the demo's photograph: with torch's attention, with `sparse_fmha.attention`, whose losses must be
the same up to rounding, and with a window around each token. Seed, weights at the start, crops and
noise are the same in all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention, silu

import sparse_fmha
from sparse_fmha.cli import one_line_errors

with one_line_errors(install="sparse-fmha[demo]"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sparse_fmha.cli import photo

PATCH = 2  # pixels on a side of a token
TORCH, OURS, WINDOW = "torch", "sparse_fmha, dense", "sparse_fmha, window"


@dataclasses.dataclass(frozen=True)
class Setting:
    side: int  # of a crop, pixels
    window: int  # of the third attention, tokens on both axes
    dim: int
    heads: int
    layers: int
    batch: int
    rate: float  # of learning, after a rise over the first twentieth of the steps
    steps: int

    @property
    def grid(self) -> int:
        return self.side // PATCH


TINY = Setting(side=32, window=5, dim=64, heads=2, layers=2, batch=8, rate=1e-3, steps=120)
LARGE = Setting(side=128, window=13, dim=512, heads=8, layers=8, batch=16, rate=2e-4, steps=2000)


class DenseAttention(nn.Module):
    """Has the parameters of `sparse_fmha.nn.NeighborhoodAttention`, and sees the whole grid."""

    def __init__(self, dim: int, heads: int, attend: Callable[..., Tensor], device: str) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv = nn.Linear(dim, 3 * dim, device=device)
        self.proj = nn.Linear(dim, dim, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, dim] to the same."""
        heads = self.qkv(x.flatten(1, 2)).unflatten(-1, (3 * self.heads, -1))
        out = self.attend(*heads.chunk(3, -2))  # [B, L, H, D] each
        return self.proj(out.flatten(-2)).view(x.shape)


def attend_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attention_of(name: str, setting: Setting, device: str) -> nn.Module:
    dim, heads = setting.dim, setting.heads
    if name == WINDOW:
        window = (setting.window, setting.window)
        return sparse_fmha.nn.NeighborhoodAttention(dim, heads, window, device=device)
    attend = {TORCH: attend_torch, OURS: sparse_fmha.attention}[name]
    return DenseAttention(dim, heads, attend, device)


class Block(nn.Module):
    """Attention and an MLP; the noise level shifts, scales and gates both, as in DiT."""

    def __init__(self, attention: nn.Module, dim: int, device: str) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(
            nn.LayerNorm(dim, elementwise_affine=False, device=device) for _ in range(2)
        )
        up, down = nn.Linear(dim, 4 * dim, device=device), nn.Linear(4 * dim, dim, device=device)
        self.mlp = nn.Sequential(up, nn.GELU(), down)
        self.level = nn.Linear(dim, 6 * dim, device=device)
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        numbers = self.level(silu(level))[:, None, None].chunk(6, -1)
        for n, part in enumerate((self.attention, self.mlp)):
            shift, scale, gate = numbers[3 * n : 3 * n + 3]
            x = x + (1 + gate) * part(self.norms[n](x) * (1 + scale) + shift)
        return x


class DiffusionTransformer(nn.Module):
    """Predicts picture minus noise from their mixture and the share of the picture in it."""

    def __init__(self, name: str, setting: Setting, device: str) -> None:
        super().__init__()
        dim, channels = setting.dim, 3 * PATCH**2
        self.enter = nn.Linear(channels, dim, device=device)
        places = torch.randn(setting.grid, setting.grid, dim, device=device)
        self.place = nn.Parameter(0.02 * places)
        self.share = nn.Sequential(
            nn.Linear(dim, dim, device=device), nn.SiLU(), nn.Linear(dim, dim, device=device)
        )
        self.blocks = nn.ModuleList(
            Block(attention_of(name, setting, device), dim, device) for _ in range(setting.layers)
        )
        self.norm = nn.LayerNorm(dim, device=device)
        self.leave = nn.Linear(dim, channels, device=device)
        waves = 2 ** torch.linspace(0, 10, dim // 2, device=device)
        self.register_buffer("waves", waves, persistent=False)

    def forward(self, mixed: Tensor, share: Tensor) -> Tensor:
        """mixed [B, Y, X, channels], share [B]."""
        angles = share[:, None] * self.waves
        level = self.share(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.enter(mixed) + self.place
        for block in self.blocks:
            x = block(x, level)
        return self.leave(self.norm(x))


def batches(setting: Setting, steps: int, seed: int, device: str):
    """Crops as tokens [B, Y, X, channels], noise like them, and shares [B] of each step."""
    picture = 2 * photo.load(None, setting.side, sys.maxsize, None) - 1
    tokens = picture.unfold(1, setting.side, 1).unfold(2, setting.side, 1)  # [3, y, x, side, side]
    draw = torch.Generator("cpu").manual_seed(seed)
    count = setting.batch
    for _ in range(steps):
        y, x = (torch.randint(n, (count,), generator=draw, device="cpu") for n in tokens.shape[1:3])
        crops = tokens[:, y, x].unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))
        crops = crops.permute(1, 2, 4, 0, 3, 5).flatten(3)  # from [3, B, Y, patch, X, patch]
        noise = torch.randn(crops.shape, generator=draw, device="cpu")
        share = torch.rand(count, generator=draw, device="cpu")
        yield tuple(t.to(device) for t in (crops, noise, share))


def train(
    name: str, setting: Setting, steps: int, seed: int, device: str
) -> tuple[list[float], float]:
    """The loss of every step, and seconds. bfloat16 autocast on a GPU, else float32."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(name, setting, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, betas=(0.9, 0.95))
    rising = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / rising))
    losses = []
    start = time.perf_counter()
    for crops, noise, share in batches(setting, steps, seed, device):
        part = share[:, None, None, None]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            found = model(part * crops + (1 - part) * noise, share)
        loss = mse_loss(found.float(), crops - noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    curve = torch.stack(losses).tolist()  # waits for the device
    return curve, time.perf_counter() - start


def smooth(curve: list[float], over: int) -> list[float]:
    sums = torch.tensor([0.0, *curve], dtype=torch.float64, device="cpu").cumsum(0)
    return ((sums[over:] - sums[:-over]) / over).tolist()


def distances(curve: list[float], other: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(curve, other, strict=True)]


def draw(path: Path, curves: dict[str, list[float]]) -> None:
    """Losses on the left, their distances from the first curve on the right, which has no zeros."""
    figure = Figure(figsize=(8.4, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = len(curves[TORCH])
    over = max(1, steps // 20)
    ends = range(over, steps + 1)
    for n, ((name, curve), line) in enumerate(zip(curves.items(), ("-", "--", "-"), strict=True)):
        style = {"color": f"C{n}", "label": name}
        left.plot(ends, smooth(curve, over), line, linewidth=1.5, **style)
        if name != TORCH:
            apart = distances(curve, curves[TORCH])
            right.plot(range(1, steps + 1), apart, ".", markersize=4, **style)
    left.set(yscale="log", xlabel="step", ylabel=f"loss, mean of {over} steps")
    right.set(yscale="log", xlabel="step", ylabel="distance")
    titles = "training loss", f"distance from the loss with {TORCH}"
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    figure.savefig(path, pil_kwargs={"optimize": True})


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--tiny", action="store_true", help="the CPU's setting on a GPU, too")
    p.add_argument(
        "--steps", type=int, metavar="N", help="instead of the setting's", default=argparse.SUPPRESS
    )
    p.add_argument("--seed", type=int, default=0, help="of weights, crops and noise")
    p.add_argument("--out", type=Path, default=Path("training.png"), help="PNG of the curves")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch sees no CUDA device")
    setting = TINY if args.tiny or args.device == "cpu" else LARGE
    steps = getattr(args, "steps", setting.steps)
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {args.out}")
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: no such folder")
    grid, window = setting.grid, setting.window
    print(f"{grid}x{grid} tokens, {setting.layers} layers, {steps} steps, {args.device}")
    print(f"{'attention':24} {'loss: start':>11} {'end':>7} {'largest distance':>17} {'time':>8}")
    curves: dict[str, list[float]] = {}
    last = max(1, steps // 10)  # steps that the end is the mean of
    for name in (TORCH, OURS, WINDOW):
        curves[name], seconds = train(name, setting, steps, args.seed, args.device)
        apart = max(distances(curves[name], curves[TORCH]))
        title = f"{name} {window}x{window}" if name == WINDOW else name
        shown = "" if name == TORCH else f"{apart:.1e}"
        end = sum(curves[name][-last:]) / last
        print(f"{title:24} {curves[name][0]:11.4f} {end:7.4f} {shown:>17} {seconds:6.1f} s")
    draw(args.out, curves)
    print(f"end: mean of the last {last} steps; picture: {args.out}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
