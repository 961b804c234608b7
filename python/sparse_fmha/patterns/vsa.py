"""Video sparse attention: the best cubes of each cube, and a gated view of all cubes' means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import (
    check_device,
    check_floats,
    check_instance,
    check_int,
    check_number,
    plain_ints,
)
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.patterns.cubes import CubeOrder
from sparse_fmha.selection import pooled_scores, top_k_blocks


def kept_cubes(keep: float, cubes: int) -> int:
    """Returns the number of cubes that are a share of all: rounded up, at least 1."""
    return max(1, math.ceil(check_number("keep", keep, 0, 1) * cubes - 1e-9))


@plain_ints
def vsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: CubeOrder,
    *,
    keep: float = 0.1,
    top_k: int | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Video sparse attention (VSA): the whole method from q, k, v to out.

    With the means q_I, k_J, v_J of cubes and A = softmax over J of scale * q_I . k_J:

        coarse_i = sum over J of A_IJ v_J, for token i of cube I
        fine_i = attention of token i over the tokens of the `top_k` cubes J with the largest A_IJ
        out_i = gate_i * coarse_i + fine_i

    Tokens before or after the grid (text, audio, references) see all tokens and all cubes see
    them, exactly; they have no part in the coarse branch.

    Source: "VSA: Faster Video Diffusion with Trainable Sparse Attention" (2025), arXiv:2505.13389,
    and the code of FastVideo: cubes of 4 x 4 x 4 tokens, and a gate that is a linear layer of the
    model. Models are trained for it (FastWan; FastH3 keeps 10% of the cubes). Tokens outside the
    grid are an addition of FastH3.

    Args:
        q: `[B, tokens, Hq, D]`, not permuted. k, v: `[B, tokens, Hkv, D]`; dtypes as in
            `attention`.
        order: of these tokens, on their device, such as
            `CubeOrder((frames, height, width), (4, 4, 4))`.
        keep: share of the cubes, 0 to 1; the number is rounded up, at least 1.
        top_k: number of cubes instead.
        gate: what broadcasts to q's shape, for example `[B, tokens, Hq, D]`; None: 1. Not used for
            tokens outside the grid.
        scale: default `D**-0.5`.

    Returns:
        `[B, tokens, Hq, D]` in q's dtype, without waiting for the device. Differentiable in q, k, v
        and gate; not through the choice of cubes. It holds copies of q, k, v and the output in cube
        order, and A, 4 bytes for each pair of cubes and head.

    Raises:
        ValueError, TypeError: tensors do not match the order, or a number is not allowed.
    """
    check_instance("order", order, CubeOrder)
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    cubes = math.prod(order.cubes)
    if top_k is None:
        top_k = kept_cubes(keep, cubes)
    top_k = min(check_int("top_k", top_k, 1), cubes)
    if gate is not None:
        _check_gate(gate, q)
    group = q.shape[2] // k.shape[2]
    means_q, means_k, means_v = (order.means(x)[:, order.inside] for x in (q, k, v))
    shares = pooled_scores(means_q, means_k, scale=scale, softmax=True)
    others = order.others()
    blocks = others.expand(*shares.shape[:2], order.regions, -1).clone()
    blocks[:, :, order.inside, order.inside] = top_k_blocks(shares, top_k)
    mask = order.mask(blocks, top_k + order.regions - cubes)
    permuted = order.permute(q), order.permute(k), order.permute(v)
    out = order.undo(block_sparse_attention(*permuted, mask, scale=scale))
    with without_autocast(q.device):
        coarse = shares.unflatten(1, (-1, group)) @ means_v.transpose(1, 2)[:, :, None]
    coarse = coarse.flatten(1, 2).transpose(1, 2).to(out.dtype)
    inside = slice(order.before, q.shape[1] - order.after)
    place = order.slots[inside] // order.block - order.first
    coarse = coarse.index_select(1, place)
    if gate is not None:
        coarse = gate.expand(q.shape)[:, inside] * coarse
    parts = [(out[:, inside] + coarse).to(out.dtype)]
    if order.before:
        parts.insert(0, attention(q[:, : inside.start], k, v, scale=scale))
    if order.after:
        parts.append(attention(q[:, inside.stop :], k, v, scale=scale))
    return torch.cat(parts, 1)


def _check_gate(gate: Tensor, q: Tensor) -> None:
    check_floats("gate", gate)
    check_device("gate", gate, q.device)
    pairs = zip(reversed(gate.shape), reversed(q.shape), strict=False)
    if gate.dim() > q.dim() or any(size not in (1, full) for size, full in pairs):
        raise ValueError(
            f"gate must have a shape that broadcasts to {list(q.shape)}, got {list(gate.shape)}"
        )
