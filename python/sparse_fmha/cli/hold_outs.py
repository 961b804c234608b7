"""Small drawn problems of every mechanism and pass, judged against fp64 on any device.

The error of a result is its largest difference to fp64, relative to the largest element. At most
twice the error of torch's own attention is right, in the same dtype and under the same mask, plus
rounding. Masks come from `sparse_fmha.reference`, which shares nothing with the kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_fmha
from sparse_fmha import reference
from sparse_fmha._sizes import ceil_div

BATCH, HEADS, HEADS_KV = 2, 4, 2
HEAD_DIMS = (64, 96, 128, 256)
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A call. q is [B, *Lq, Hq, D], k and v are [B, *Lk, Hkv, D]."""

    mechanism: str  # as `kernels()` has it
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor  # bool, broadcastable to [B, Hq, Lq, Lk]
    attend: Attend  # returns out and lse


@dataclass(frozen=True)
class Outcome:
    """What one pass of a problem came to."""

    case: str
    passed: str
    kernels: str
    error: float | None  # None: the call raised
    torchs: float | None
    verdict: str  # "ok", or what is wrong

    @property
    def is_right(self) -> bool:
        return self.verdict == "ok"


class Draw:
    """Draws problems of one head dim and dtype."""

    def __init__(self, seed: int, head_dim: int, device: str, dtype: torch.dtype) -> None:
        self.choose = random.Random(f"{seed} {head_dim} {dtype}")
        self.generator = torch.Generator("cpu").manual_seed(self.choose.randrange(2**31))
        self.head_dim, self.device, self.dtype = head_dim, device, dtype

    def values(self, tokens: tuple[int, ...], heads: int) -> Tensor:
        x = torch.randn(
            BATCH, *tokens, heads, self.head_dim,
            generator=self.generator, device="cpu", dtype=torch.float32,
        )  # fmt: skip
        return x.to(self.device, self.dtype)

    def chance(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device="cpu", dtype=torch.float32)

    def problem(
        self, mechanism: str, len_q: tuple[int, ...], len_kv: tuple[int, ...], visible: Tensor,
        attend: Attend,
    ) -> Problem:  # fmt: skip
        q, k, v = (
            self.values(*of) for of in ((len_q, HEADS), (len_kv, HEADS_KV), (len_kv, HEADS_KV))
        )
        return Problem(mechanism, q, k, v, visible.to(self.device), attend)

    def dense(self) -> Problem:
        len_q, len_kv = (self.choose.randrange(70, 300) for _ in range(2))
        visible = torch.ones(len_q, len_kv, dtype=torch.bool, device="cpu")
        return self.problem("dense", (len_q,), (len_kv,), visible, lambda q, k, v: (
            sparse_fmha.attention(q, k, v, return_lse=True)))  # fmt: skip

    def causal(self) -> Problem:
        len_q = self.choose.randrange(70, 200)
        len_kv = len_q + self.choose.randrange(100)
        return self.problem(
            "causal", (len_q,), (len_kv,), reference.causal_mask(len_q, len_kv),
            lambda q, k, v: sparse_fmha.attention(q, k, v, causal=True, return_lse=True),
        )  # fmt: skip

    def neighborhood(self) -> Problem:
        grid = self.choose.randrange(9, 20), self.choose.randrange(9, 20)
        dilation = self.choose.randrange(1, 3)
        window = tuple(self.choose.randrange(2, length // dilation + 1) for length in grid)
        stride = tuple(self.choose.randrange(1, length + 1) for length in window)
        causal = (self.choose.random() < 0.5, False)
        visible = reference.neighborhood_mask(grid, window, stride, dilation, causal)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return sparse_fmha.neighborhood_attention(
                q, k, v, window, stride=stride, dilation=dilation, causal=causal, return_lse=True
            )

        return self.problem("neighborhood", grid, grid, visible, attend)

    def block_sparse(self) -> Problem:
        block_q, block_kv = self.choose.choice(((64, 64), (128, 128), (128, 16), (64, 32)))
        len_q, len_kv = (self.choose.randrange(130, 400) for _ in range(2))
        blocks = ceil_div(len_q, block_q), ceil_div(len_kv, block_kv)
        listed = self.chance(1, HEADS, *blocks) < 0.4
        listed[..., 0] = True
        rows, keys = (torch.arange(n, device="cpu") for n in (len_q, len_kv))
        visible = listed[..., rows // block_q, :][..., keys // block_kv]
        mask = sparse_fmha.BlockMask.from_blocks(
            listed.to(self.device), len_q, len_kv, block_q, block_kv
        )
        return self.problem("block_sparse", (len_q,), (len_kv,), visible, lambda q, k, v: (
            sparse_fmha.block_sparse_attention(q, k, v, mask, return_lse=True)))  # fmt: skip

    def stripe(self) -> Problem:
        block_q = 128
        len_q, len_kv = (self.choose.randrange(130, 400) for _ in range(2))
        seen = self.chance(1, HEADS, ceil_div(len_q, block_q), len_kv) < 0.3
        seen[..., 0] = True
        mask = sparse_fmha.StripeMask.from_columns(seen.to(self.device), len_q, block_q)
        visible = seen[..., torch.arange(len_q, device="cpu") // block_q, :]
        return self.problem("stripe", (len_q,), (len_kv,), visible, lambda q, k, v: (
            sparse_fmha.stripe_attention(q, k, v, mask, return_lse=True)))  # fmt: skip

    def decode(self) -> Problem:
        len_q, cache = self.choose.randrange(1, 4), self.choose.randrange(200, 400)
        lengths = [self.choose.randrange(len_q, cache + 1) for _ in range(BATCH)]
        keys, queries = (torch.arange(n, device="cpu") for n in (cache, len_q))
        last = torch.tensor(lengths, device="cpu")[:, None] - len_q + queries
        visible = (keys <= last[..., None])[:, None]
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        return self.problem("decode", (len_q,), (cache,), visible, lambda q, k, v: (
            sparse_fmha.decode_attention(q, k, v, seq_lens, return_lse=True)))  # fmt: skip


MECHANISMS = ("dense", "causal", "neighborhood", "block_sparse", "stripe", "decode")


def outcomes(arch: str, device: str, seed: int) -> Iterator[Outcome]:
    """Runs every mechanism and pass at several head dims, in the dtypes of the device."""
    dtypes = (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float16)
    for mechanism in MECHANISMS:
        for head_dim in HEAD_DIMS:
            for dtype in dtypes:
                problem = getattr(Draw(seed, head_dim, device, dtype), mechanism)()
                yield from judge(problem, arch)


def judge(problem: Problem, arch: str) -> Iterator[Outcome]:
    """The forward pass, and the gradients of q, k and v."""
    dtype = str(problem.q.dtype).removeprefix("torch.")
    case = f"{problem.mechanism}, D{problem.q.shape[-1]}, {dtype}"
    passes: dict[str, tuple[str, ...]] = {"forward": ("forward",)}
    if problem.mechanism == "decode":
        passes = {"decode": ("decode",)}
    else:
        passes["backward"] = ("backward_dq", "backward_dkv")
    for name, directions in passes.items():
        kernels = ", ".join(row_of(problem, arch, of) for of in directions)
        try:
            error, torchs = errors(problem, name == "backward")
        except (RuntimeError, NotImplementedError, ValueError) as raised:
            reason = " ".join(str(raised).split())[:200]
            yield Outcome(case, name, kernels, None, None, f"raised {reason}")
            continue
        allowed = 2 * torchs + 2 * torch.finfo(problem.q.dtype).eps
        verdict = "ok" if error <= allowed else f"WRONG, at most {allowed:.1e} is right"
        yield Outcome(case, name, kernels, error, torchs, verdict)


def row_of(problem: Problem, arch: str, direction: str) -> str:
    """The name of the kernel that a pass takes."""
    from sparse_fmha._extension import _C

    dtype = str(problem.q.dtype).removeprefix("torch.")
    mechanism = "dense" if problem.mechanism == "decode" else problem.mechanism
    try:
        found = _C.find_kernel(
            arch, mechanism, dtype, problem.q.shape[-1], False, direction, False, 0
        )
    except RuntimeError:
        return "none"
    return found["name"]


def errors(problem: Problem, backward: bool) -> tuple[float, float]:
    """The largest relative error of ours and of torch's; NaN counts as infinite."""
    inputs = [problem.q, problem.k, problem.v]
    ours = results(problem.attend, inputs, backward)
    exact = results(
        lambda q, k, v: reference.attention(q, k, v, problem.visible),
        [x.double() for x in inputs],
        backward,
    )
    torchs = results(lambda q, k, v: torch_attention(q, k, v, problem.visible), inputs, backward)

    def largest(found: list[Tensor]) -> float:
        worst = 0.0
        for x, y in zip(found, exact, strict=True):
            off = (x.double() - y).abs().max() / y.abs().max()
            worst = max(worst, off.nan_to_num(nan=torch.inf).item())
        return worst

    return largest(ours), largest(torchs)


def results(attend: Attend, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """out and lse, or the gradients of q, k and v."""
    if not backward:
        with torch.no_grad():
            return list(attend(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, _ = attend(*leaves)
    generator = torch.Generator("cpu").manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, device="cpu", dtype=torch.float32)
    dout = dout.to(inputs[0].device, torch.bfloat16).to(out.dtype)  # the same in every dtype
    return list(torch.autograd.grad(out, leaves, dout))


def torch_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own attention without fusion, and the lse of its scores."""
    tq, tk, tv = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    mask = visible.expand(BATCH, HEADS, tq.shape[2], tk.shape[2])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, enable_gqa=True)
    keys = tk.repeat_interleave(HEADS // HEADS_KV, 1)
    scores = (tq.float() @ keys.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return out.transpose(1, 2).reshape(q.shape), lse.transpose(1, 2).reshape(q.shape[:-1])
