"""Sparsifiner's predictors trained for a small vision transformer, and what they choose.

    python examples/train_sparsifiner.py      # on a CPU in under a minute

Images of 64 patches, one of which has a mark: the class is the pattern of that patch, so the class
token must find it, here among the keys that are chosen for it, too. First a dense model is trained,
the teacher. In phase one a predictor learns its attention maps, in phase two a copy of it learns to
do with the keys that the predictor chooses, by labels and by the teacher. Then, on images not seen
before: accuracies, and the share of the class token's probability on the keys that are chosen.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparse_fmha import attention, block_sparse_attention
from sparse_fmha.cli import one_line_errors
from sparse_fmha.patterns import SparsifinerPredictor, sparsifiner_distillation_loss

PATCHES, PIXELS, CLASSES = 64, 24, 8
HEADS, DIM, LAYERS = 2, 32, 1
TOKENS = 1 + PATCHES
KEEP = 0.25  # of the keys
BATCH = 64


def drawn(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images `[number, PATCHES, PIXELS]` and their classes."""
    images = 0.5 * torch.randn(number, PATCHES, PIXELS, generator=generator, device="cpu")
    patterns = torch.randint(CLASSES, (number, PATCHES), generator=generator, device="cpu")
    images[..., :CLASSES] += 2 * torch.nn.functional.one_hot(patterns, CLASSES)
    marked = torch.randint(PATCHES, (number,), generator=generator, device="cpu")
    rows = torch.arange(number, device="cpu")
    images[rows, marked, CLASSES:] += 1.5
    return images, patterns[rows, marked]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, DIM)).unbind(2)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.out(mixed.flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.embed, self.head = nn.Linear(PIXELS, width), nn.Linear(width, CLASSES)
        self.start = nn.Parameter(torch.zeros(1, 1, width, device="cpu", dtype=torch.float32))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(
        self, images: Tensor, predictors: Sequence[SparsifinerPredictor] = ()
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns logits, the last layer's tokens, and q and k of each layer.

        Args:
            predictors: one for each layer, or none for dense attention.
        """
        x = self.embed(images)
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        kept = []
        for n, layer in enumerate(self.layers):
            q, k, v = layer.project(x)
            if predictors:
                mixed = block_sparse_attention(q, k, v, predictors[n].mask(q, k))
            else:
                mixed = attention(q, k, v)
            kept.append((q, k))
            x = layer.finish(x, mixed)
        return self.head(x[:, 0]), x, kept


def maps(kept: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Attention maps of each layer, `[B, heads, tokens, tokens]`, which are small here."""
    return [
        (torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5).softmax(-1).detach() for q, k in kept
    ]


def reconstruction(predictors, kept, targets) -> Tensor:
    """The loss of phase one: the mean over layers and images."""
    losses = [
        predictor.reconstruction_loss(q.detach(), k.detach(), target) / len(target)
        for predictor, (q, k), target in zip(predictors, kept, targets, strict=True)
    ]
    return sum(losses) / len(losses)


def train(parameters, steps: int, rate: float, generator: torch.Generator, loss_of) -> list[float]:
    """Minimizes `loss_of(images, classes)`; returns the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(2, steps))
    losses = []
    for _ in range(steps):
        loss = loss_of(*drawn(BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def figures(teacher, student, predictors, others, images: Tensor, classes: Tensor):
    """Of the trained models and predictors, and of the teacher with others that are not trained."""
    found = {}
    cases = {
        "dense": (teacher, ()),
        "keys of untrained predictors": (teacher, others),
        "chosen keys, before phase two": (teacher, predictors),
        "chosen keys": (student, predictors),
    }
    for name, (model, chosen_by) in cases.items():
        logits, _, kept = model(images, chosen_by)
        found[f"accuracy, {name}"] = (logits.argmax(-1) == classes).float().mean().item()
        shares = [
            (target * predictor.mask(q, k).to_dense())[:, :, 0].sum(-1).mean().item()
            for predictor, (q, k), target in zip(chosen_by, kept, maps(kept), strict=False)
        ]
        if shares:
            found[f"probability, {name}"] = sum(shares) / len(shares)
    return found


def trained(steps: int, seed: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The losses of each phase, and the figures."""
    generator = torch.Generator("cpu").manual_seed(seed)
    torch.manual_seed(seed)
    teacher = Transformer()
    losses = {}
    losses["dense"] = train(
        teacher.parameters(), 3 * steps, 3e-3, generator,
        lambda images, classes: cross_entropy(teacher(images)[0], classes),
    )  # fmt: skip
    teacher.requires_grad_(False)
    predictors = nn.ModuleList(
        SparsifinerPredictor(TOKENS, HEADS, DIM, keep=KEEP, dense_rows=0) for _ in range(LAYERS)
    )

    def phase_one(images: Tensor, classes: Tensor) -> Tensor:
        kept = teacher(images)[2]
        return reconstruction(predictors, kept, maps(kept))

    others = copy.deepcopy(predictors)
    losses["phase one"] = train(predictors.parameters(), 2 * steps, 1e-2, generator, phase_one)
    student = copy.deepcopy(teacher).requires_grad_(True)

    def phase_two(images: Tensor, classes: Tensor) -> Tensor:
        logits, tokens, kept = student(images, predictors)
        with torch.no_grad():
            wanted, wanted_tokens, of_teacher = teacher(images)
        loss = cross_entropy(logits, classes)
        loss = loss + sparsifiner_distillation_loss(logits, wanted, tokens, wanted_tokens)
        return loss + 0.01 * reconstruction(predictors, kept, maps(of_teacher))

    parameters = [*student.parameters(), *predictors.parameters()]
    losses["phase two"] = train(parameters, steps, 1e-3, generator, phase_two)
    images, classes = drawn(512, generator)
    return losses, figures(teacher, student, predictors, others, images, classes)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--steps",
        type=int,
        default=100,
        metavar="N",
        help="of phase two; the others take twice as many",
    )
    p.add_argument("--seed", type=int, default=0, help="of weights and images")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    losses, found = trained(args.steps, args.seed)
    for name, values in losses.items():
        print(f"loss, {name}: {values[0]:.3f} to {values[-1]:.3f}")
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
