"""Small problems on kernels whose PTX the driver compiles: CUDA_FORCE_PTX_JIT=1 python this ARCH

Prints a line of JSON: errors by problem, relative to the largest element of what fp64 computes, and
`own`, what Hopper's kernels raise, which have no PTX. torch's kernels have none either for most
GPUs, so tensors are made on the CPU and copied.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, reference

TOKENS, HEADS, DIM = 300, 2, 64


def tensors(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """On the CPU, fp16."""
    rng = torch.Generator("cpu").manual_seed(0)
    made = (torch.randn(size, generator=rng, dtype=torch.float32, device="cpu") for size in sizes)
    return [x.half() for x in made]


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    found = found.detach().cpu().double().reshape(exact.shape)
    return ((found - exact).abs().max() / exact.abs().max()).item()


def forward(attend: Callable[..., torch.Tensor], visible: torch.Tensor, grid: tuple) -> float:
    q, k, v = tensors(*[(1, *grid, HEADS, DIM)] * 3)
    out = attend(q.cuda(), k.cuda(), v.cuda())
    exact, _ = reference.attention(*(x.flatten(1, -3) for x in (q, k, v)), visible)
    return distance(out, exact)


def dense() -> float:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_fmha.attention(q, k, v, causal=True)

    return forward(attend, reference.causal_mask(TOKENS, TOKENS, torch.device("cpu")), (TOKENS,))


def neighborhood() -> float:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_fmha.neighborhood_attention(q, k, v, (5, 9))

    return forward(attend, reference.neighborhood_mask((15, 20), (5, 9)), (15, 20))


def drawn(*size: int) -> torch.Tensor:
    rng = torch.Generator("cpu").manual_seed(1)
    return torch.rand(size, generator=rng, dtype=torch.float32, device="cpu") < 0.4


def block_lists() -> float:
    """Their plan is made on the device, by kernels that all architectures share."""
    mask = BlockMask.from_blocks(drawn(1, HEADS, 5, 5), TOKENS, TOKENS, 64, 64)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_fmha.block_sparse_attention(q, k, v, mask.to("cuda"))

    return forward(attend, mask.to_dense(), (TOKENS,))


def stripes() -> float:
    mask = StripeMask.from_columns(drawn(1, HEADS, 3, TOKENS), TOKENS, 128)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_fmha.stripe_attention(q, k, v, mask.to("cuda"))

    return forward(attend, mask.to_dense(), (TOKENS,))


def decode() -> float:
    q, k, v = tensors((1, 1, HEADS, DIM), *[(1, TOKENS, HEADS, DIM)] * 2)
    lengths = torch.tensor([TOKENS - 50], dtype=torch.int32, device="cpu")
    out = sparse_fmha.decode_attention(q.cuda(), k.cuda(), v.cuda(), lengths.cuda())
    visible = torch.arange(TOKENS, device="cpu")[None] < lengths[:, None]
    exact, _ = reference.attention(q, k, v, visible)
    return distance(out, exact)


def gradients() -> float:
    """Of all inputs of dense attention."""
    size = (1, TOKENS, HEADS, DIM)
    q, k, v, dout = tensors(*[size] * 4)
    given = [x.cuda().requires_grad_() for x in (q, k, v)]
    out = sparse_fmha.attention(*given)
    found = torch.autograd.grad(out, given, dout.cuda())
    wide = [x.double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    scores = wide[0] @ wide[1].mT * DIM**-0.5
    exact = torch.autograd.grad(scores.softmax(-1) @ wide[2], wide, dout.double().transpose(1, 2))
    return max(map(distance, found, (x.transpose(1, 2) for x in exact)))


PROBLEMS = (dense, neighborhood, block_lists, stripes, decode, gradients)


def own() -> str | None:
    q, k, v = (x.cuda() for x in tensors(*[(1, TOKENS, HEADS, DIM)] * 3))
    try:
        sparse_fmha.attention(q, k, v)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return None


def main(arch: str) -> None:
    sparse_fmha.allow_untested()
    with sparse_fmha.arch_override(arch):
        found: dict[str, float | str | None] = {p.__name__: p() for p in PROBLEMS}
    if torch.cuda.get_device_capability() == (9, 0):
        found["own"] = own()  # last: what it raises may stay with the context
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
