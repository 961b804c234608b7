"""Small problems of every mechanism for its gradients, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_fmha import BlockMask, StripeMask

OPS = torch.ops.sparse_fmha


def values(*shape, seed, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def block_lists(q_len, kv_len, block_q, block_kv, heads=2, shown=0.4, causal=False, seed=0):
    """Full and partial blocks at random; with fewer `shown`, also rows that see no key."""
    rng = torch.Generator().manual_seed(seed)
    visible = torch.rand(1, heads, q_len, kv_len, generator=rng) < shown
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)
    kinds = torch.randint(3, (heads, rows, columns), generator=rng)  # as drawn, full, empty
    for head, row, column in torch.cartesian_prod(*map(torch.arange, kinds.shape)):
        kind = kinds[head, row, column]
        if kind > 0:
            block = visible[0, head, row * block_q :, column * block_kv :]
            block[:block_q, :block_kv] = kind == 1

    def options(device):
        mask = BlockMask.from_dense(visible.to(device), block_q, block_kv)
        names = ("counts", "indices", "partial_counts", "partial_indices", "partial_bits")
        sizes = {"block_q": block_q, "block_kv": block_kv, "causal": causal}
        return {name: getattr(mask, name) for name in names} | sizes

    return options


def stripe_lists(q_len, kv_len, block_q, heads=2, share=0.3, runs=True, causal=False, seed=0):
    """Columns at random, and a run in front of them."""
    rng = torch.Generator().manual_seed(seed)
    groups = -(-q_len // block_q)
    seen = torch.rand(1, heads, groups, kv_len, generator=rng) < share
    if runs:
        seen[..., 3:67] = False

    def options(device):
        mask = StripeMask.from_columns(seen.to(device), q_len, block_q)
        lists = {"columns": mask.columns, "counts": mask.counts}
        if runs:
            shape = 1, heads, groups
            lists["range_starts"] = torch.full((*shape, 1), 3, dtype=torch.int32, device=device)
            counts = torch.randint(2, shape, generator=rng.manual_seed(seed), dtype=torch.int32)
            lists["range_counts"] = counts.to(device)
        else:
            lists |= {"range_starts": None, "range_counts": None}
        return lists | {"block_q": block_q, "range_size": 64, "causal": causal}

    return options


def plain(**options):
    return lambda device: options


def window(size, stride=1, dilation=1, causal=0):
    def per_axis(value):
        return list(value) if isinstance(value, tuple) else [value] * len(size)

    return plain(
        window=list(size),
        stride=per_axis(stride),
        dilation=per_axis(dilation),
        causal=per_axis(causal),
    )


@dataclass(frozen=True)
class Case:
    """`options(device)` are the op's arguments behind q, k and v, without scale and extras."""

    mechanism: str
    q: tuple[int, ...]
    options: Callable[[Any], dict] = field(default=plain())
    kv: tuple[int, ...] | None = None
    heads: int = 2
    heads_kv: int = 1
    extra: int = 0
    scale: float | None = None
    batch: int = 1

    def arguments(self, dtype=torch.float64, device="cpu", dim=8, seed=0, value_dim=None):
        """What the forward op takes, by name. value_dim: head dim of values; None: `dim`."""

        def one(place, *axes, heads=self.heads_kv, width=dim):
            shape = self.batch, *axes, heads, width
            return values(*shape, seed=5 * seed + place, dtype=dtype, device=device)

        kv, width = self.kv or self.q, value_dim or dim
        found = {"q": one(0, *self.q, heads=self.heads), "k": one(1, *kv)}
        found["v"] = one(2, *kv, width=width)
        found |= self.options(device) | {"scale": self.scale}
        if self.extra:
            found |= {"extra_k": one(3, self.extra), "extra_v": one(4, self.extra, width=width)}
        return found

    def forward(self, arguments):
        """out and lse of the raw op."""
        return getattr(OPS, f"{self.mechanism}_fwd")(**arguments)

    def backward(self, arguments, out, lse, dout, dlse=None, **wanted):
        """The gradients of the raw op, by the names of what they are of.

        That of a shared key_bias is summed.
        """
        op = getattr(OPS, f"{self.mechanism}_bwd")
        found = op(dout=dout, dlse=dlse, out=out, lse=lse, **arguments, **wanted)
        names = [n for n in ("q", "k", "v", "extra_k", "extra_v", "key_bias") if n in arguments]
        found = dict(zip(names, found, strict=True))
        if wanted.get("need_dbias", "key_bias" in found):
            found["key_bias"] = found["key_bias"].sum_to_size(arguments["key_bias"].shape)
        return found


CASES = {
    "dense": Case("fmha", (19,)),
    "dense, more keys": Case("fmha", (9,), kv=(21,), heads=3, heads_kv=3),
    "dense, a negative scale": Case("fmha", (9,), scale=-0.4, batch=2),
    "dense, a scale of 0": Case("fmha", (9,), scale=0.0),
    "dense, one query": Case("fmha", (1,), kv=(18,)),
    "dense, one key": Case("fmha", (18,), kv=(1,)),
    "causal": Case("fmha", (19,), plain(causal=True), heads=4, heads_kv=2),
    "causal, more keys": Case("fmha", (9,), plain(causal=True), kv=(21,)),
    "causal, rows without keys": Case("fmha", (21,), plain(causal=True), kv=(9,)),
    "1-D": Case("neighborhood", (21,), window((7,)), batch=2),
    "1-D, stride": Case("neighborhood", (21,), window((8,), 4), extra=2),
    "1-D, all of it": Case("neighborhood", (12,), window((12,), 12)),
    "1-D, dilation, causal": Case("neighborhood", (22,), window((5,), 2, 3, 1), scale=-0.3),
    "1-D, itself alone": Case("neighborhood", (9,), window((1,))),
    "2-D": Case("neighborhood", (5, 6), window((3, 4), (1, 2))),
    "2-D, causal on one axis": Case("neighborhood", (6, 5), window((3, 2), causal=(1, 0)), extra=3),
    "2-D, dilation": Case("neighborhood", (7, 5), window((3, 2), (2, 1), (2, 2)), heads=3, extra=1),
    "3-D": Case("neighborhood", (3, 4, 3), window((2, 3, 2), (2, 1, 1))),
    "3-D, causal": Case("neighborhood", (3, 3, 4), window((2, 2, 3), 1, 1, (1, 0, 1)), extra=2),
    "blocks 64x16": Case("block_sparse", (70,), block_lists(70, 40, 64, 16), kv=(40,)),
    "blocks 64x64, rows without keys": Case(
        "block_sparse", (70,), block_lists(70, 70, 64, 64, shown=0.02)
    ),
    "blocks 128x32, causal": Case(
        "block_sparse", (40,), block_lists(40, 70, 128, 32, causal=True), kv=(70,)
    ),
    "blocks 64x128, one list for all": Case(
        "block_sparse", (30,), block_lists(30, 140, 64, 128, heads=1, seed=2), kv=(140,)
    ),
    "stripes": Case("stripe", (70,), stripe_lists(70, 90, 64), kv=(90,)),
    "stripes, causal": Case("stripe", (80,), stripe_lists(80, 80, 64, causal=True)),
    "stripes, rows without keys": Case(
        "stripe", (70,), stripe_lists(70, 20, 64, share=0.03, runs=False), kv=(20,)
    ),
    "stripes, one list for all": Case(
        "stripe", (70,), stripe_lists(70, 75, 128, heads=1), kv=(75,), heads=3, heads_kv=3
    ),
}
LARGE = {  # several tiles on every axis
    "dense": Case("fmha", (333,), heads=4, heads_kv=2, batch=2),
    "dense, more keys": Case("fmha", (130,), kv=(517,)),
    "dense, a negative scale": Case("fmha", (200,), scale=-0.1),
    "dense, a scale of 0": Case("fmha", (200,), scale=0.0),
    "causal": Case("fmha", (400,), plain(causal=True), heads=4, heads_kv=2),
    "causal, more keys": Case("fmha", (150,), plain(causal=True), kv=(411,), heads=3, heads_kv=3),
    "causal, rows without keys": Case("fmha", (411,), plain(causal=True), kv=(150,)),
    "1-D": Case("neighborhood", (700,), window((65,), 3), extra=70, batch=2),
    "2-D": Case("neighborhood", (25, 34), window((9, 14), (1, 2), causal=(0, 1))),
    "2-D, dilation": Case("neighborhood", (33, 31), window((7, 5), (1, 5), (2, 3)), extra=5),
    "3-D": Case("neighborhood", (6, 13, 17), window((3, 6, 7), (1, 2, 1)), extra=3),
    "3-D, aligned": Case("neighborhood", (8, 16, 16), window((4, 8, 8), (4, 8, 8))),
    "blocks 128x128": Case("block_sparse", (400,), block_lists(400, 530, 128, 128), kv=(530,)),
    "blocks 64x64, causal": Case(
        "block_sparse", (400,), block_lists(400, 400, 64, 64, 4, causal=True), heads=4, heads_kv=2
    ),
    "blocks 128x16": Case("block_sparse", (300,), block_lists(300, 300, 128, 16, shown=0.1)),
    "blocks 64x32, one list for all": Case(
        "block_sparse", (330,), block_lists(330, 450, 64, 32, 1, 0.3), kv=(450,), heads=4, batch=2
    ),
    "blocks 128x64, causal, rows without keys": Case(
        "block_sparse",
        (410,),
        block_lists(410, 330, 128, 64, 6, 0.05, causal=True),
        kv=(330,),
        heads=6,
        heads_kv=2,
    ),
    "blocks 64x128, more queries": Case(
        "block_sparse", (2200,), block_lists(2200, 150, 64, 128, seed=3), kv=(150,)
    ),
    "stripes": Case("stripe", (600,), stripe_lists(600, 1100, 128, share=0.1), kv=(1100,)),
    "stripes, causal": Case(
        "stripe", (500,), stripe_lists(500, 500, 256, 4, causal=True), heads=4, heads_kv=2
    ),
    "1-D, wide, dilation": Case("neighborhood", (1057,), window((520,), 7, 2), heads=3),
    "2-D, wide": Case("neighborhood", (30, 34), window((21, 26), (3, 1)), extra=70, batch=2),
    "3-D, wide": Case(
        "neighborhood",
        (9, 13, 17),
        window((8, 8, 9), (1, 8, 2), causal=(1, 0, 0)),
        heads=4,
        heads_kv=2,
    ),
}
