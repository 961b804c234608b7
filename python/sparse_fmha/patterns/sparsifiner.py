"""Sparsifiner: a small predictor chooses the keys of each token of a vision transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_fmha._checks import check_floats, check_int, check_number, check_q_and_k, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.selection import top_k_blocks


class SparsifinerPredictor(nn.Module):
    """Predicts which keys each token of a fixed number of tokens looks at, for each head.

    With projections a, b of queries and keys to `reduced_dim` (shared by all heads) and matrices
    down, up `[tokens, rank]`, of low rank over the tokens,

        coefficients C = softmax((q a) ((k b)^T down) * heads**-0.5)     [tokens, rank]
        connectivity S = C up^T                                          [tokens, tokens]

    `forward` returns S, which learns to be the attention map (`reconstruction_loss`). `mask` uses a
    sparse S: the `coefficients` largest of each row of C, and those entries of |up| above
    `threshold`; each token sees the `ceil(keep * tokens)` keys with the largest S. The first
    `dense_rows` tokens (the class token) see all.

    Source: Wei et al. 2023, "Sparsifiner: Learning Sparse Instance-Dependent Attention for
    Efficient Vision Transformers", arXiv:2303.13755, and its code, whose defaults these are: rank
    tokens / 6, half the head dim, 8 coefficients, threshold 0.02, a quarter of the keys. The code
    also drops tokens by their attention from the class token; that is up to the caller. Its top-k
    takes any of several equal scores, this one the first.

    Args:
        tokens: of every input. heads: query heads. head_dim: D.
        rank: default `tokens // 6`, at least 1. reduced_dim: default `head_dim // 2`.
        keep: share of the keys, 0 to 1. coefficients: at least 1. threshold: at least 0.
        dense_rows: tokens at the start that see all.
        device, dtype: of the weights.

    Raises:
        ValueError, TypeError: a number is not allowed.
    """

    @plain_ints
    def __init__(
        self,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        rank: int | None = None,
        reduced_dim: int | None = None,
        keep: float = 0.25,
        coefficients: int = 8,
        threshold: float = 0.02,
        dense_rows: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tokens = check_int("tokens", tokens, 1)
        self.heads = check_int("heads", heads, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        rank = max(1, tokens // 6) if rank is None else check_int("rank", rank, 1)
        half = max(1, head_dim // 2)
        reduced_dim = half if reduced_dim is None else check_int("reduced_dim", reduced_dim, 1)
        self.coefficients = check_int("coefficients", coefficients, 1)
        self.threshold = check_number("threshold", threshold, 0, math.inf)
        self.dense_rows = check_int("dense_rows", dense_rows)
        if dense_rows > tokens:
            raise ValueError(f"dense_rows must be at most tokens = {tokens}, got {dense_rows}")
        self.budget = math.ceil(check_number("keep", keep, 0, 1) * tokens - 1e-9)
        self.project_q = nn.Linear(head_dim, reduced_dim, device=device, dtype=dtype)
        self.project_k = nn.Linear(head_dim, reduced_dim, device=device, dtype=dtype)
        self.down = nn.Parameter(torch.empty(tokens, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(tokens, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes the projections as `nn.Linear` does, the others with deviation 0.02."""
        self.project_q.reset_parameters()
        self.project_k.reset_parameters()
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns S of the tokens after the first `dense_rows`: `[B, heads, rows, tokens]`.

        Args:
            q: `[B, tokens, heads, head_dim]`. k: `[B, tokens, Hkv, head_dim]`, in the dtype of the
                weights.
        """
        return self._coefficients(q, k) @ self.up.T

    @torch.no_grad()
    def mask(self, q: Tensor, k: Tensor, *, block_q: int = 64, block_kv: int = 64) -> BlockMask:
        """Returns the mask of the keys that each token sees, exact for tokens.

        Args:
            q, k: as in `forward`.
            block_q, block_kv: as in `BlockMask`.

        Returns:
            A mask with lists for each batch entry and head, built without waiting for the device.
            Nearly every block is partial, and costs as much as a full one: at these lengths sparse
            attention does the work of dense attention. Bitmasks take `tokens**2 / 8` bytes for
            each head.
        """
        block_checks.check_sizes(self.tokens, self.tokens, block_q, block_kv, False)
        coefficients = self._coefficients(q, k)
        largest = top_k_blocks(coefficients, self.coefficients)
        basis = functional.threshold(self.up.abs(), self.threshold, 0.0)
        scores = coefficients.masked_fill(~largest, 0) @ basis.T
        seen = top_k_blocks(scores, self.budget)
        visible = functional.pad(seen, (0, 0, self.dense_rows, 0), value=True)
        width = ceil_div(self.tokens, block_kv)
        return BlockMask.from_dense(visible, block_q, block_kv, partial_width=width)

    def reconstruction_loss(self, q: Tensor, k: Tensor, target: Tensor) -> Tensor:
        """Returns the sum of squares of S - target, the loss of the first phase of training.

        The published loss is the mean of this over the layers, times 0.01.

        Args:
            q, k: as in `forward`.
            target: attention map `[B, heads, tokens, tokens]`, the teacher's (or, for
                self-distillation, that of the model without a mask, times 0.002).
        """
        check_floats("target", target, 4, "[batch, heads, tokens, tokens]")
        return functional.mse_loss(
            self(q, k), target[:, :, self.dense_rows :].detach(), reduction="sum"
        )

    def _coefficients(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns C, `[B, heads, rows, rank]`."""
        check_q_and_k(q, k)
        sizes = (self.tokens, self.heads, self.head_dim)
        if q.shape[1:] != sizes or k.shape[1] != self.tokens:
            raise ValueError(
                f"q and k must have {self.tokens} tokens, and q {self.heads} heads of "
                f"{self.head_dim}, got shapes {list(q.shape)} and {list(k.shape)}"
            )
        dtype = self.down.dtype
        for name, x in (("q", q), ("k", k)):
            if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"{name} must have the dtype of the weights, {dtype}, got {x.dtype}"
                )
        queries = self.project_q(q[:, self.dense_rows :]).transpose(1, 2)
        keys = torch.einsum("bnhc,nr->bhcr", self.project_k(k), self.down)
        keys = keys.repeat_interleave(self.heads // k.shape[2], 1)
        coefficients: Tensor = (queries @ keys * self.heads**-0.5).softmax(-1)
        return coefficients


def sparsifiner_distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    teacher_tokens: Tensor,
    *,
    cls_weight: float = 0.5,
    token_weight: float = 0.5,
) -> Tensor:
    """Returns what the second phase of training adds to the loss of the labels.

    The Kullback-Leibler divergence of the classes' probabilities from the teacher's (mean over the
    batch), and the mean square of the difference of the last layer's tokens, each times its weight.
    Source: see `SparsifinerPredictor`; the weights are those of its code. There, the second may
    also be a divergence.

    Args:
        logits, teacher_logits: `[B, classes]`. tokens, teacher_tokens: of equal shapes.

    Raises:
        ValueError, TypeError: a weight is not a number at least 0; shapes differ.
    """
    check_number("cls_weight", cls_weight, 0, math.inf)
    check_number("token_weight", token_weight, 0, math.inf)
    for name, own, other in (
        ("logits", logits, teacher_logits),
        ("tokens", tokens, teacher_tokens),
    ):
        check_floats(name, own)
        check_floats(f"teacher_{name}", other)
        if own.shape != other.shape:
            raise ValueError(
                f"teacher_{name} must have the shape of {name}, {list(own.shape)}, got "
                f"{list(other.shape)}"
            )
    classes = functional.kl_div(
        logits.log_softmax(-1),
        teacher_logits.detach().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    last = functional.mse_loss(tokens, teacher_tokens.detach())
    return cls_weight * classes + token_weight * last
