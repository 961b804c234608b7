"""Masks of stripes beside block lists of as many keys, and inputs in which the keys that count are
known.
"""

from __future__ import annotations

import torch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, reference

RUN = 128  # keys
BLOCK = 128
SINKS = 4
STRIPES = 256  # distant keys of each key head that count
SIZES = {  # heads of queries and keys, head dim, tokens, rows of a group, keys it sees
    "full": dict(
        heads=32, heads_kv=8, dim=128, length=128 * 1024, rows=2048, keys=(4096, 16384, 65536)
    ),
    "tiny": dict(heads=2, heads_kv=1, dim=128, length=8192, rows=2048, keys=(512,)),
}


def tensors(size: dict, device: str, dtype, generator) -> list[torch.Tensor]:
    shapes = [(1, size["length"], size[h], size["dim"]) for h in ("heads", "heads_kv", "heads_kv")]
    return [torch.randn(s, device=device, dtype=dtype, generator=generator) for s in shapes]


def draw(size: dict, count: int, below: int, device: str, generator) -> torch.Tensor:
    """int32 `[1, H, groups, count]`, ascending: so many of `below`, others for each group."""
    heads, groups = size["heads"], size["length"] // size["rows"]
    rows = [
        torch.rand(groups, below, device=device, generator=generator).topk(count).indices
        for _ in range(heads)
    ]
    return torch.stack(rows).sort(-1).values.int()[None]


def masks(size: dict, keys: int, device: str, generator) -> dict[str, StripeMask | BlockMask]:
    """By name, masks of as many keys for each query."""
    length, rows = size["length"], size["rows"]
    heads, groups = size["heads"], length // rows

    def full(value: int, n: int = groups) -> torch.Tensor:
        return torch.full((1, heads, n), value, dtype=torch.int32, device=device)

    columns = draw(size, keys, length, device, generator)
    # One run in each piece of two runs' length, at any offset in it: none overlap.
    starts = draw(size, keys // RUN, length // (2 * RUN), device, generator) * (2 * RUN)
    offsets = torch.randint(0, RUN, starts.shape, device=device, generator=generator)
    starts = starts + offsets.int()
    none = columns[..., :0].contiguous()

    def blocks(indices: torch.Tensor) -> BlockMask:
        indices = indices.repeat_interleave(rows // BLOCK, 2).contiguous()
        counts = full(indices.shape[-1], indices.shape[2])
        return BlockMask(counts, indices, length, length, BLOCK, BLOCK)

    first = torch.arange(keys // BLOCK, dtype=torch.int32, device=device)
    return {
        "contiguous blocks": blocks(first.expand(1, heads, groups, -1)),
        "random blocks": blocks(draw(size, keys // BLOCK, length // BLOCK, device, generator)),
        "columns": StripeMask(columns, full(keys), length, length, rows),
        "runs": StripeMask(none, full(0), length, length, rows, starts, full(keys // RUN), RUN),
    }


def attend(q, k, v, mask: StripeMask | BlockMask, **options):
    """The attention that takes such a mask."""
    if isinstance(mask, StripeMask):
        return sparse_fmha.stripe_attention(q, k, v, mask, **options)
    return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)


def error(out: torch.Tensor, mask, q, k, v) -> float:
    """Root mean square of the difference from fp64, relative; a few rows of the last head."""
    rows = torch.linspace(0, q.shape[1] - 1, 7, device=q.device).round().long()
    group = q.shape[2] // k.shape[2]
    seen = torch.zeros(len(rows), k.shape[1], dtype=torch.bool, device="cpu")
    for i, row in enumerate(rows.tolist()):
        if isinstance(mask, StripeMask):
            n = row // mask.block_q
            seen[i, mask.columns[0, -1, n, : mask.counts[0, -1, n]].long().cpu()] = True
            runs = 0 if mask.range_starts is None else int(mask.range_counts[0, -1, n])
            for start in mask.range_starts[0, -1, n, :runs].tolist() if runs else ():
                seen[i, start : start + mask.range_size] = True
        else:
            n = row // mask.block_q
            listed = mask.indices[0, -1, n, : mask.counts[0, -1, n]].long().cpu()
            seen[i].view(-1, mask.block_kv)[listed] = True
    head = [q.shape[2] - 1]
    heads_kv = [head[0] // group]
    exact, _ = reference.attention(
        q[:, rows][:, :, head], k[:, :, heads_kv], v[:, :, heads_kv], seen.to(q.device)
    )
    difference = out[:, rows][:, :, head].double() - exact
    return (difference.norm() / exact.norm()).item()


def planted(size: dict, device: str, dtype, seed: int):
    """q, k, v and, for each key head, the distant keys that count.

    Scores, in natural-log units: 16 with the first `SINKS` keys and 12 with `STRIPES` keys at
    random, for every query, along one direction of the first half of the head; and around 12 with
    the nearest keys, as the second half turns with the position (as rotary embeddings do, with wave
    lengths of 25 to 400 tokens). The rest is noise of standard deviation 1.5 and less.
    """
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (0.1 * x for x in tensors(size, device, torch.float32, generator))
    v = v * 10
    length, dim, heads_kv = size["length"], size["dim"], size["heads_kv"]
    half, root = dim // 2, dim**0.5
    distant = torch.rand(heads_kv, length, device=device, generator=generator)
    distant = distant.topk(STRIPES).indices.sort(-1).values
    way = torch.nn.functional.normalize(
        torch.randn(heads_kv, half, device=device, generator=generator), dim=-1
    )
    q[..., :half] += root * way.repeat_interleave(size["heads"] // heads_kv, 0)
    for head in range(heads_kv):
        k[0, distant[head], head, :half] += 12 * way[head]
    k[0, :SINKS, :, :half] += 16 * way
    waves = torch.logspace(0, 1, half // 2, base=1 / 16, device=device) / 4
    angles = torch.arange(length, device=device)[:, None] * waves
    turning = torch.cat([angles.cos(), angles.sin()], -1)[:, None]
    amplitude = (12 * root / (half // 2)) ** 0.5
    q[..., half:] += amplitude * turning
    k[..., half:] += amplitude * turning
    return *(x.to(dtype) for x in (q, k, v)), distant


def planted_video(size: dict, device: str, dtype, seed: int, stride: int = 128):
    """q, k, v and the stride, with the grid that MMInference finds in prompts of frames.

    Every query scores 14 more, in natural-log units, with the keys at a phase of the stride, drawn
    for each key head. Queries at the phase lack that and look at all keys alike. The rest is noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (0.1 * x for x in tensors(size, device, torch.float32, generator))
    v = v * 10
    dim, group = size["dim"], size["heads"] // size["heads_kv"]
    phases = torch.randint(stride, (size["heads_kv"],), device=device, generator=generator)
    for head, phase in enumerate(phases.tolist()):
        own = slice(head * group, (head + 1) * group)
        way = torch.randn(dim, device=device, generator=generator)
        way = torch.nn.functional.normalize(way, dim=0)
        k[:, phase::stride, head] += 14 * way
        on_line = torch.arange(size["length"], device=device) % stride == phase
        q[:, :, own] += dim**0.5 * way * ~on_line[:, None, None]
    return *(x.to(dtype) for x in (q, k, v)), stride


def blocks_with(distant: torch.Tensor, size: dict, device: str) -> BlockMask:
    """Blocks with a key that counts, the first ones, and those near the diagonal."""
    n = size["length"] // BLOCK
    seen = torch.zeros(size["heads_kv"], n, dtype=torch.bool, device=device)
    seen.scatter_(1, distant // BLOCK, True)
    seen[:, 0] = True
    q = torch.arange(n, device=device)[:, None]
    near = (torch.arange(n, device=device) > q - 3).expand(n, n)
    seen = seen.repeat_interleave(size["heads"] // size["heads_kv"], 0)
    blocks = (seen[:, None] | near) & (torch.arange(n, device=device) <= q)
    return BlockMask.from_blocks(
        blocks[None], size["length"], size["length"], BLOCK, BLOCK, causal=True
    )
