"""Problems of backward passes: dense attention, neighborhoods, block lists and stripes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases import case as cases
from benchmarks.cases.block_lists import Lists
from sparse_fmha import BlockMask, StripeMask, reference, selection

TOKENS, WIDTH = 32768, 2048  # batch * length, heads * head dim


@dataclass(frozen=True)
class Case:
    """One problem; exactly one of causal to columns says which keys a query sees."""

    name: str
    grid: tuple[int, ...]
    heads: int
    head_dim: int = 128
    heads_kv: int | None = None
    batch: int = 1
    causal: bool | None = None
    window: tuple[int, ...] | None = None
    blocks: tuple[int, int, float] | None = None  # block_q, block_kv, share of the blocks
    columns: tuple[int, float] | None = None  # rows of a group, share of the keys, each alone
    stride: tuple[int, ...] | int = 1

    def tiny(self) -> Case:
        """The same with few tokens."""
        sides = tuple(min(side, {1: 256, 2: 16, 3: 8}[len(self.grid)]) for side in self.grid)
        window = self.window and tuple(map(min, self.window, (side // 2 for side in sides)))
        stride = min(self.stride, 4) if isinstance(self.stride, int) else 1
        columns = self.columns and (64, self.columns[1])
        size = {"grid": sides, "window": window, "stride": stride, "batch": 1, "columns": columns}
        heads = 2 if self.heads_kv is None else 4
        return Case(**{**asdict(self), **size, "heads": heads, "heads_kv": self.heads_kv and 2})

    def of_peers(self, device: str, dtype: torch.dtype) -> cases.Case:
        """The same problem as peers know it, which have no lists of single keys."""
        assert not self.columns
        axes, tokens = len(self.grid), math.prod(self.grid)
        lists = None
        grid: dict[str, object]
        if self.window:
            stride = (self.stride,) * axes if isinstance(self.stride, int) else self.stride
            grid = {"grid": self.grid, "window": self.window, "stride": stride}
            grid |= {"dilation": (1,) * axes, "causal": (False,) * axes}
        else:
            grid = {"causal": bool(self.causal)}
        if self.blocks:
            block_q, block_kv, share = self.blocks
            columns = tokens // block_kv
            lists = Lists(block_q, block_kv, max(int(columns * share), 1) / columns, "uniform")
        return cases.Case(
            self.name, device, str(dtype).removeprefix("torch."), self.batch, tokens, self.heads,
            self.heads_kv or self.heads, self.head_dim, lists=lists, **grid,
        )  # fmt: skip

    def pairs(self) -> float:
        """Visible pairs of one head."""
        tokens = math.prod(self.grid)
        if self.window:
            return tokens * math.prod(self.window)
        if self.blocks:
            _, block_kv, share = self.blocks
            return tokens * block_kv * max(int(tokens // block_kv * share), 1)
        if self.columns:
            return tokens * max(int(tokens * self.columns[1]), 1)
        return tokens * (tokens + 1) / 2 if self.causal else tokens * tokens

    def walk(self) -> tuple[tuple[int, int, int], ...]:
        """Grid, window, stride, dilation and causal of three axes, as `_C.tiles` takes them."""
        axes = len(self.grid)

        def three(values: tuple[int, ...]) -> tuple[int, int, int]:
            first, second, third = (1,) * (3 - axes) + values
            return first, second, third

        assert self.window is not None
        stride = (self.stride,) * axes if isinstance(self.stride, int) else self.stride
        return three(self.grid), three(self.window), three(stride), (1, 1, 1), (0, 0, 0)

    def executed_pairs(self, tile_q: int, tile_k: int) -> int:
        """Of one head and of a window: those in the tiles that Hopper's backward kernels visit."""
        from sparse_fmha import _C

        walk = self.walk()
        grid, *_, dilation, _ = walk
        box, costs = _C.tiles.max_box(grid, dilation), _C.tiles.costs(self.head_dim)
        # As sm90/geometry/grid/launch_keys.h chooses them.
        _, _, (_, visited, *_), _ = _C.tiles.rank(walk, tile_q, tile_k, box, costs, static=True)[0]
        return visited * tile_q * tile_k


def dense(head_dim: int, length: int, causal: bool, heads: int | None = None) -> Case:
    name = f"D{head_dim} {'causal' if causal else 'full'} {length // 1024}k"
    own = WIDTH // head_dim
    grouped = {} if heads is None else {"heads_kv": heads}
    return Case(
        name + (f" {2 * own}/{heads} heads" if heads else ""), (length,),
        2 * own if heads else own, head_dim, batch=TOKENS // length, causal=causal, **grouped,
    )  # fmt: skip


CASES = (
    *(dense(d, n, c) for d in (64, 128, 256) for c in (False, True) for n in (4096, 8192, 16384)),
    *(dense(128, 8192, c, heads=8) for c in (False, True)),
    Case("FLUX", (256, 256), 24, window=(80, 80)),
    Case("FLUX, stride 16", (256, 256), 24, window=(80, 80), stride=16),
    Case("HunyuanVideo", (30, 48, 80), 24, window=(18, 24, 24)),
    Case("HunyuanVideo, stride 16x8x8", (30, 48, 80), 24, window=(18, 24, 24), stride=(16, 8, 8)),
    Case("Cosmos", (16, 44, 80), 32, window=(16, 24, 16)),
    Case("Cosmos, stride 1x8x16", (16, 44, 80), 32, window=(16, 32, 48), stride=(1, 8, 16)),
    Case("1-D", (32768,), 16, window=(2048,)),
    Case("1-D, stride 256", (32768,), 16, window=(2048,), stride=256),
    Case("1-D, stride 2048", (32768,), 16, window=(2048,), stride=2048),
    Case("lists 128x128", (32768,), 24, blocks=(128, 128, 0.1)),
    Case("lists 64x64", (32768,), 24, blocks=(64, 64, 0.1)),
    Case("lists 128x16", (32768,), 24, blocks=(128, 16, 0.1)),
    Case("stripes of 512 rows", (32768,), 24, columns=(512, 0.1)),
)


def attention_of(case: Case, device: str, seed: int) -> tuple[Callable[..., Tensor], Tensor]:
    """The call, and which query sees which key, of at most 2048 tokens."""
    tokens = math.prod(case.grid)
    small = tokens <= 2048
    everything = torch.ones(1 if not small else tokens, tokens, dtype=torch.bool, device=device)
    if case.window:
        axes = len(case.grid)
        stride = (case.stride,) * axes if isinstance(case.stride, int) else case.stride
        options = {"window": case.window, "stride": stride}
        visible = (
            reference.neighborhood_mask(case.grid, case.window, stride, device=device)
            if small
            else everything
        )
        return lambda q, k, v: sparse_fmha.neighborhood_attention(q, k, v, **options), visible
    if case.blocks:
        block_q, block_kv, share = case.blocks
        generator = torch.Generator(device).manual_seed(seed)
        sizes = 1, case.heads, -(-tokens // block_q), -(-tokens // block_kv)
        scores = torch.rand(sizes, generator=generator, device=device)
        lists = selection.top_k_indices(scores, max(int(tokens // block_kv * share), 1))
        mask = BlockMask(*lists, tokens, tokens, block_q, block_kv)
        visible = mask.to_dense() if small else everything
        return lambda q, k, v: sparse_fmha.block_sparse_attention(q, k, v, mask), visible
    if case.columns:
        rows, share = case.columns
        generator = torch.Generator(device).manual_seed(seed)
        sizes = 1, case.heads, -(-tokens // rows), tokens
        scores = torch.rand(sizes, generator=generator, device=device)
        counts, columns = selection.top_k_indices(scores, max(int(tokens * share), 1))
        stripes = StripeMask(columns, counts, tokens, tokens, rows)
        visible = stripes.to_dense() if small else everything
        return lambda q, k, v: sparse_fmha.stripe_attention(q, k, v, stripes), visible
    visible = reference.causal_mask(tokens, tokens, device) if case.causal and small else everything
    return lambda q, k, v: sparse_fmha.attention(q, k, v, causal=case.causal), visible


def problem(case: Case, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k and v, which want gradients, and the gradient of out."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = case.heads, case.heads_kv or case.heads, case.heads_kv or case.heads, case.heads
    found = []
    for h in heads:
        shape = case.batch, *case.grid, h, case.head_dim
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        found.append(x)
    return [*(x.requires_grad_() for x in found[:3]), found[3]]


def backward(out: Tensor, inputs: Sequence[Tensor], dout: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
