"""Small problems on every GPU kernel, for compute-sanitizer: python -m benchmarks.sanitize

Each is also checked against the fp64 reference, so a run that computes nothing does not pass.
"""

from __future__ import annotations

import itertools
import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a tensor's end is an allocation's end

import torch

import sparse_fmha
from sparse_fmha import reference

HEAD_DIMS = (64, 96, 128, 256)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # about two units of the last place
# batch, length of queries, length of keys, query heads, key heads, strided: one tile, ragged tiles,
# several tiles, grouped heads, unequal lengths, rows that see nothing.
SHAPES = [
    (1, 128, 128, 1, 1, False),
    (2, 77, 201, 2, 1, True),
    (1, 333, 333, 4, 2, False),
    (1, 65, 500, 2, 2, True),
    (1, 300, 40, 1, 1, False),
]


def tensor(batch: int, length: int, heads: int, head_dim: int, dtype, strided: bool):
    """[B, L, H, D]; strided is a transposed slice of a larger tensor."""
    if not strided:
        return torch.randn(batch, length, heads, head_dim, dtype=dtype, device="cuda")
    storage = torch.randn(batch, heads, length + 3, head_dim + 8, dtype=dtype, device="cuda")
    return storage[:, :, :length, :head_dim].transpose(1, 2)


def relative_error(q, k, v, causal: bool) -> float:
    out, lse = sparse_fmha.attention(q, k, v, causal=causal, return_lse=True)
    q, k, v = (x.cpu() for x in (q, k, v))
    i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    visible = torch.arange(k.shape[1]) <= i if causal else torch.ones_like(i, dtype=torch.bool)
    exact, exact_lse = reference.attention(q, k, v, visible.expand(q.shape[1], k.shape[1]))
    lse, seen = lse.cpu().double(), exact_lse.isfinite()
    if not torch.equal(lse.isfinite(), seen):
        return float("inf")
    lse_error = (lse - exact_lse)[seen].abs().max().item() if seen.any() else 0.0
    return max(((out.cpu().double() - exact).norm() / exact.norm()).item(), lse_error)


def main() -> int:
    torch.manual_seed(0)
    failed = count = 0
    options = itertools.product(HEAD_DIMS, TOLERANCE, (False, True), SHAPES)
    for head_dim, dtype, causal, shape in options:
        batch, len_q, len_kv, heads_q, heads_kv, strided = shape
        q = tensor(batch, len_q, heads_q, head_dim, dtype, strided)
        k, v = (tensor(batch, len_kv, heads_kv, head_dim, dtype, strided) for _ in range(2))
        error = relative_error(q, k, v, causal)
        count += 1
        if not error <= TOLERANCE[dtype]:
            failed += 1
            print(f"error {error:.1e}: {dtype}, D={head_dim}, causal={causal}, shape {shape}")
    print(f"{count} problems, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
