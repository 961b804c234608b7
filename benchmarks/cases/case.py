"""A case of `python -m benchmarks`: its shape, and the work that it is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from benchmarks.cases import grids
from benchmarks.cases.block_lists import Lists

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


WARPGROUP_ROWS = 64


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
    causal: bool | tuple[bool, ...] = False  # of each axis where there is a grid
    grid: tuple[int, ...] = ()  # of a neighborhood case; its product is the length
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    lists: Lists | None = None  # of a block-sparse case
    value_dim: int = 0  # head dim of v and out; 0: head_dim
    skip: int = 0  # percent of the key tiles that the inputs let a threshold skip
    dense_iterations: int = 0  # timed calls of dense attention over the same tokens
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
        if self.lists:
            return "selection" if self.lists.kind == "selected" else "block_sparse"
        return "neighborhood" if self.window else "causal" if self.causal else "dense"

    @property
    def dims(self) -> tuple[int, int]:
        """Head dims of q and k, and of v and out."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def axes(self) -> tuple[grids.Axis, ...]:
        """Length, window, stride, dilation and causal of each axis of a grid."""
        options = (self.grid, self.window, self.stride, self.dilation, self.causal)
        return tuple(zip(*options, strict=True)) if self.window else ()

    @property
    def options(self) -> dict[str, tuple]:
        """What neighborhood_attention takes besides tensors and the window."""
        return {"stride": self.stride, "dilation": self.dilation, "causal": self.causal}

    @property
    def dense(self) -> Case:
        """Dense attention over the same tokens as one sequence; causal beside a case that skips."""
        none = {"grid": (), "window": (), "stride": (), "dilation": (), "lists": None, "skip": 0}
        causal = self.causal if self.skip else False
        return replace(self, causal=causal, dense_iterations=0, **none)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of one head that take part in the softmax."""
        if self.window:
            return grids.visible_pairs(self.axes)
        if self.lists:
            return self.lists.visible_pairs(self.length)
        return self.length * (self.length + 1) // 2 if self.causal else self.length**2

    @property
    def useful_flops(self) -> int:
        """Of both matrix products, visible pairs only; a multiply-add counts two. Of the product of
        the pooled rows where a mask is made."""
        if self.mechanism == "selection":
            return 2 * self.batch * self.heads_q * self.head_dim * math.prod(self._blocks)
        return 2 * self.batch * self.heads_q * sum(self.dims) * self.visible_pairs

    @property
    def _blocks(self) -> tuple[int, int]:
        return self.lists.grid(self.length)

    @property
    def min_bytes(self) -> int:
        """q, k, v read once, out and lse written once; where a mask is made q and k, and lists."""
        rows = self.batch * self.length
        if self.mechanism == "selection":
            read = rows * (self.heads_q + self.heads_kv) * self.head_dim * BYTES[self.dtype]
            return read + 4 * self.batch * self.heads_q * self.lists.total(self.length)
        elements = rows * (self.heads_q + self.heads_kv) * sum(self.dims)
        return elements * BYTES[self.dtype] + 4 * rows * self.heads_q

    def executed_flops(self, kernel: dict | None) -> int | None:
        """Of the tiles that `kernel` (a row of the kernel table) computes, masked pairs and the
        padding of lengths and head dim included; None where it is not known, where tiles are chosen
        at run time, and on grids, where sparse_fmha.simulate counts. Each warpgroup passes over the
        key tiles that none of its rows sees. Of block lists what is listed, by any kernel."""
        if self.mechanism == "block_sparse":
            pairs = self.lists.listed_pairs(self.length)
            return 2 * self.batch * self.heads_q * sum(self.dims) * pairs
        if not kernel or self.lists:
            return None
        tile_q, tile_k = kernel["tile_q"], kernel["tile_k"]
        if not tile_q or not tile_k or self.window:
            return None
        tiles = 0
        for first in range(0, -(-self.length // tile_q) * tile_q, WARPGROUP_ROWS):
            last_key = min(first + WARPGROUP_ROWS, self.length) if self.causal else self.length
            tiles += -(-last_key // tile_k)
        pairs = tiles * WARPGROUP_ROWS * tile_k
        dims = kernel["head_dim"] + kernel["value_dim"]
        return 2 * self.batch * self.heads_q * dims * pairs

    def shape(self) -> dict:
        fields = asdict(self)
        left_out = {"name", "quick", "dense_iterations"}
        left_out |= set() if self.value_dim else {"value_dim"}
        return {k: fields[k] for k in fields if k not in left_out}
