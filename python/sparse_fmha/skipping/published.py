"""Thresholds of softmax skipping that others published for a model."""

from __future__ import annotations

from sparse_fmha.skipping.law import Point

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LENGTH = 32768  # at which the products below are made into thresholds; any would do
# threshold * keys for each share, by phase. Source: TensorRT-LLM's blog on skip softmax attention,
# with tiles of 128 x 128 (decode 1 x 128).
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "Qwen/Qwen3-30B-A3B-Instruct-2507": {
        "prefill": (18.76, 44.37, 104.97, 248.40, 587.18, 1390.63, 3293.04, 7799.91, 18471.56),
        "decode": (0.32, 0.86, 2.30, 6.17, 16.52, 44.26, 118.62, 317.99, 852.20),
    },
}


def points(model: str) -> list[Point]:
    """Raises ValueError: there are none for this model."""
    if model not in PUBLISHED:
        raise ValueError(f"model must be one of {list(PUBLISHED)}, got {model!r}")
    return [
        Point(phase, LENGTH, product / LENGTH, share, 1)
        for phase, products in PUBLISHED[model].items()
        for share, product in zip(SHARES, products, strict=True)
    ]
