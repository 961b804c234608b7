"""The cases that are measured, and the work that each of them is.

A name says what is computed: fmha/d128/causal/8k. Lengths are tokens in units of 1024.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
WARPGROUP_ROWS = 64
TOKENS = 32 * 1024  # batch x length of a GPU case


@dataclass(frozen=True)
class Case:
    name: str
    device: str  # cuda or cpu
    dtype: str
    batch: int
    length: int
    heads_q: int
    heads_kv: int
    head_dim: int
    causal: bool = False
    grid: tuple[int, ...] = ()  # of a neighborhood case; its product is the length
    window: tuple[int, ...] = ()
    quick: bool = False

    @property
    def group(self) -> str:
        """The name without the length: what one row of a table or one plot shows."""
        return self.name.rsplit("/", 1)[0]

    @property
    def size(self) -> str:
        return self.name.rsplit("/", 1)[1]

    @property
    def mechanism(self) -> str:
        return "neighborhood" if self.window else "causal" if self.causal else "dense"

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of one head that take part in the softmax."""
        if self.window:
            return self.length * math.prod(self.window)
        return self.length * (self.length + 1) // 2 if self.causal else self.length**2

    @property
    def useful_flops(self) -> int:
        """Of both matrix products, visible pairs only; a multiply-add counts two."""
        return 4 * self.batch * self.heads_q * self.head_dim * self.visible_pairs

    @property
    def min_bytes(self) -> int:
        """q, k, v read once, out and lse written once."""
        rows = self.batch * self.length
        elements = 2 * rows * (self.heads_q + self.heads_kv) * self.head_dim
        return elements * BYTES[self.dtype] + 4 * rows * self.heads_q

    def executed_flops(self, kernel: dict) -> int | None:
        """Of the tiles that `kernel` (a row of the kernel table) computes, masked pairs and the
        padding of lengths and head dim included; None where tiles are chosen at run time. Each
        warpgroup passes over the key tiles that none of its rows sees."""
        tile_q, tile_k = kernel["tile_q"], kernel["tile_k"]
        if not tile_q or not tile_k or self.window:
            return None
        tiles = 0
        for first in range(0, -(-self.length // tile_q) * tile_q, WARPGROUP_ROWS):
            last_key = min(first + WARPGROUP_ROWS, self.length) if self.causal else self.length
            tiles += -(-last_key // tile_k)
        pairs = tiles * WARPGROUP_ROWS * tile_k
        return 4 * self.batch * self.heads_q * kernel["head_dim"] * pairs

    def shape(self) -> dict:
        fields = asdict(self)
        return {k: fields[k] for k in fields if k not in ("name", "quick")}


def _gpu(label: str, head_dim: int, heads_q: int, heads_kv: int, causal: bool, kilo: int, **more):
    name = f"fmha/{label}/{'causal' if causal else 'full'}/{kilo}k"
    length = kilo * 1024
    fields = {"dtype": "bfloat16", "quick": kilo == 8} | more
    return Case(
        name=name, device="cuda", batch=TOKENS // length, length=length, heads_q=heads_q,
        heads_kv=heads_kv, head_dim=head_dim, causal=causal, **fields,
    )  # fmt: skip


def _cpu(label: str, length: int, causal: bool = False, **more):
    suffix = f"{length // 1024}k" if length >= 1024 else str(length)
    name = f"cpu/{label}/{'causal' if causal else 'full'}/{suffix}"
    fields = {"dtype": "float32", "batch": 1, "heads_q": 2, "heads_kv": 2, "head_dim": 64} | more
    return Case(name=name, device="cpu", length=length, causal=causal, **fields)


def _neighborhood_cpu(side: int, window: int):
    return Case(
        name=f"cpu/na2d-w{window}/full/{side}x{side}", device="cpu", dtype="float32", batch=1,
        length=side * side, heads_q=2, heads_kv=2, head_dim=64, grid=(side, side),
        window=(window, window),
    )  # fmt: skip


def _all() -> list[Case]:
    lengths = (4, 8, 16, 32)
    cases = []
    for head_dim, heads in ((128, 16), (64, 32), (256, 8)):
        for causal in (False, True):
            cases += [_gpu(f"d{head_dim}", head_dim, heads, heads, causal, n) for n in lengths]
    cases += [_gpu("d96", 96, 16, 16, False, n) for n in lengths]
    cases += [_gpu("d128-fp16", 128, 16, 16, False, 8, dtype="float16")]
    cases += [_gpu("d128-gqa4", 128, 32, 8, True, 8)]
    cases += [_cpu("d64", 256, quick=True), _cpu("d64", 1024, causal=True, quick=True)]
    cases += [_cpu("d64", 1024), _cpu("d64", 4096), _cpu("d64", 4096, causal=True)]
    cases += [_cpu("d64-bf16", 1024, dtype="bfloat16")]
    cases += [_neighborhood_cpu(64, 8), _neighborhood_cpu(64, 16), _neighborhood_cpu(64, 32)]
    return cases


CASES = _all()


def select(device: str, globs: list[str], quick: bool) -> list[Case]:
    """The cases of a device whose name matches any glob; ValueError when that leaves none."""
    mine = [c for c in CASES if c.device == device]
    chosen = [c for c in mine if not globs or any(fnmatchcase(c.name, g) for g in globs)]
    if quick and not globs:
        chosen = [c for c in chosen if c.quick]
    if not chosen:
        raise ValueError(
            f"--case {' '.join(globs)}: no {device} case has such a name; there are: "
            + ", ".join(c.name for c in mine)
        )
    return chosen
