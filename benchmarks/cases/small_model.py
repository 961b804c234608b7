"""q, k and v of a small causal model that was trained a moment ago, for studies of selections.

Texts are sections in which phrases of random tokens, the section's own, are drawn again and again.
So what follows is known from where the phrase stood before in the section: the model learns to look
there, next to looking at near tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, rms_norm, scaled_dot_product_attention

VOCABULARY = 128
PHRASE = 24  # tokens
PHRASES, PLACES = 2, 16  # of a section: different ones, and how often one stands there
WIDTH = 256
LAYERS = 2
BATCH = 2  # texts of the greatest length in a step
SHORT = 512  # tokens of the first texts
RATE = 3e-3
SHARP = 2.0
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # causal; q, k, v and out [B, L, heads, dim]


@dataclass(frozen=True)
class Trained:
    """q `[1, L, heads, dim]`, k and v `[1, L, heads_kv, dim]` of the last layer on a new text."""

    qkv: list[Tensor]
    losses: list[float]  # nats a token, of each step


class Layer(nn.Module):
    def __init__(self, heads: int, heads_kv: int, dim: int) -> None:
        super().__init__()
        self.sizes = heads, heads_kv, dim
        self.qkv = nn.Linear(WIDTH, (heads + 2 * heads_kv) * dim, bias=False)
        self.out = nn.Linear(heads * dim, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def project(self, x: Tensor) -> list[Tensor]:
        """q and k with rotary embeddings, and v, `[B, L, H, dim]`."""
        heads, heads_kv, dim = self.sizes
        made = self.qkv(rms_norm(x, (WIDTH,))).unflatten(-1, (-1, dim))
        q, k, v = made.split([heads, heads_kv, heads_kv], 2)
        # Sharper than normalized q and k would be.
        return [rotated(SHARP * rms_norm(q, (dim,))), rotated(rms_norm(k, (dim,))), v]

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.out(attend(*self.project(x)).flatten(2))
        return x + self.down(self.up(rms_norm(x, (WIDTH,))).relu())


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def rotated(x: Tensor) -> Tensor:
    half = x.shape[3] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * 10000.0**-steps
    cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def texts(batch: int, length: int, device: str, generator: torch.Generator) -> Tensor:
    """int64 `[batch, length]`."""
    options = {"device": device, "generator": generator}
    sections = -(-length // (PLACES * PHRASE))
    phrases = torch.randint(VOCABULARY, (batch * sections, PHRASES, PHRASE), **options)
    drawn = torch.randint(PHRASES, (batch * sections, PLACES), **options)
    rows = torch.arange(batch * sections, device=device)[:, None]
    return phrases[rows, drawn].view(batch, -1)[:, :length]


class Model(nn.Module):
    """A token's vector has a part of the token before it, so that one layer can look for a token
    that stands behind an equal one."""

    def __init__(self, heads: int, heads_kv: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)
        self.before = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(Layer(heads, heads_kv, dim) for _ in range(LAYERS))

    def start(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        return x + self.before(pad(x[:, :-1], (0, 0, 1, 0)))

    def forward(self, text: Tensor, attend: Attend = dense) -> Tensor:
        x = self.start(text)
        for layer in self.layers:
            x = layer(x, attend)
        return rms_norm(x, (WIDTH,)) @ self.embed.weight.T


def make(size: dict[str, int], device: str, seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(size["heads"], size["heads_kv"], size["dim"]).to(device)


def loss_of(model: Model, text: Tensor, attend: Attend = dense) -> tuple[Tensor, Tensor]:
    """Nats a token, and the share of the tokens that are predicted, in bf16 on a GPU."""
    with torch.autocast(text.device.type, torch.bfloat16, enabled=text.is_cuda):
        logits = model(text[:, :-1], attend)
    logits, right = logits.flatten(0, 1).float(), text[:, 1:].flatten()
    return cross_entropy(logits, right), (logits.argmax(1) == right).float().mean()


def growing(length: int, steps: int) -> list[int]:
    """Tokens of a text in each step: SHORT ones for half of the steps, in which there are few
    places to look, then twice as many again and again."""
    longer = []
    while not longer or longer[-1] < length:
        longer.append(min(length, 2 * longer[-1] if longer else SHORT))
    first, rest = longer[0], longer[1:] or longer
    later = steps - steps // 2
    return [first] * (steps // 2) + [rest[i * len(rest) // later] for i in range(later)]


def fit(
    model: Model, lengths: Sequence[int], generator: torch.Generator,
    attend: Attend = dense, rate: float = RATE,
) -> list[float]:  # fmt: skip
    """A step on new texts of each of the lengths, with as many tokens in all as BATCH texts of the
    longest; returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(2, len(lengths)))
    losses = []
    for length in lengths:
        batch = BATCH * max(lengths) // length
        loss, _ = loss_of(model, texts(batch, length + 1, str(generator.device), generator), attend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def learned(losses: Sequence[float]) -> None:
    """Raises RuntimeError where a model predicts tokens hardly better than by their shares."""
    if losses[-1] > math.log(VOCABULARY) / 2:
        raise RuntimeError(
            f"the small model has not learned to look back: a loss of {losses[-1]:.2f} after "
            f"{len(losses)} steps, {math.log(VOCABULARY):.2f} without looking; it needs more steps"
        )


def train(size: dict[str, int], device: str, dtype: torch.dtype, seed: int, steps: int) -> Trained:
    """Trains at the length of `size`, in bf16 on a GPU."""
    generator = torch.Generator(device).manual_seed(seed)
    model = make(size, device, seed)
    losses = fit(model, growing(size["length"], steps), generator)
    with torch.no_grad():
        x = model.start(texts(1, size["length"], device, generator))
        for layer in model.layers[:-1]:
            x = layer(x, dense)
        q, k, v = model.layers[-1].project(x)
    made = [x.to(dtype).contiguous() for x in (q, k, v)]
    return Trained(made, losses)
