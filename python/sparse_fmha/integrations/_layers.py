"""Sparse methods for layers of a language model, for causal prefill.

Each is made from its options and returns two functions: one computes a call, the other reports
options that have no effect in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

from torch import Tensor

from sparse_fmha import patterns, selection
from sparse_fmha._checks import check_int, check_number
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention import attention, block_sparse_attention, stripe_attention
from sparse_fmha.calibration import LEAST, MOST, Calibration, Point
from sparse_fmha.masks.block_grid import BlockGrid


class Call(NamedTuple):
    """What a method gets besides q, k and v."""

    scale: float | None
    layer: int | None  # its index


Attend = Callable[[Tensor, Tensor, Tensor, Call], Tensor]
# From a number of keys: names of options without effect, and their messages.
WithoutEffect = Callable[[int], Iterator[tuple[str, str]]]
Made = tuple[Attend, WithoutEffect]


@dataclass(frozen=True)
class Method:
    """A method: q `[B, L, Hq, D]`, k and v `[B, L, Hkv, D]` to out like q."""

    attend: Attend
    without_effect: WithoutEffect
    name: str  # with the key that names it

    @property
    def in_torch(self) -> bool:
        """Whether the layer is for torch's attention, which takes the model's mask."""
        return self.attend is _in_torch

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return self.attend(q, k, v, call)


def dense() -> None:
    """Dense attention, for any kind of pass."""
    return None


def _in_torch(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    raise AssertionError("torch's attention takes the mask of the model")


def sdpa() -> Made:
    """torch's attention, dense, for any kind of pass and any head dim."""
    return _in_torch, lambda keys: iter(())


def skip(
    threshold: float | None = None,
    *,
    sparsity: float | None = None,
    calibration: Calibration | str | PathLike[str] | None = None,
) -> Made:
    """Softmax skipping by a threshold, or by the fraction of tiles to skip and a calibration.

    The calibration, the path of a saved one, or the name of a model for which one is published,
    gives the threshold for each call's number of keys.
    """
    if (threshold is None) == (sparsity is None):
        raise ValueError("exactly one of threshold and sparsity must be given for skip")
    if (sparsity is None) != (calibration is None):
        raise ValueError("sparsity and calibration must be given together for skip")
    points: list[Point] = []  # the fitted ones
    if sparsity is None or calibration is None:
        fixed = check_number("threshold", threshold, 0, 1 - 2**-24)

        def threshold_for(keys: int) -> float:
            return fixed
    else:
        check_number("sparsity", sparsity, 0, 1 - 2**-24)
        measured = Calibration.of(calibration)
        measured.fit()  # raises here, not in a model's call, if no law fits the points
        points = [p for p in measured.points if p.phase == "prefill" and p.tiles]
        points = [p for p in points if LEAST <= p.sparsity <= MOST]

        def threshold_for(keys: int) -> float:
            return measured.threshold_for(sparsity, keys)

    lengths, shares = [p.length for p in points], [p.sparsity for p in points]

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        chosen = threshold_for(k.shape[1])
        return attention(q, k, v, causal=True, scale=call.scale, skip_threshold=chosen)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if threshold == 0 or sparsity == 0:
            name = "threshold" if sparsity is None else "sparsity"
            yield name, f"{name} = 0 has no effect: nothing is skipped"
        elif sparsity is not None and shares and not min(shares) <= sparsity <= max(shares):
            yield (
                "sparsity",
                f"sparsity = {sparsity} is outside the range of the calibration, "
                f"{min(shares):.3g} to {max(shares):.3g}",
            )
        if sparsity and lengths and not min(lengths) <= keys <= max(lengths):
            yield (
                "calibration",
                f"{keys} keys are outside the range of the calibration, {min(lengths)} to "
                f"{max(lengths)}",
            )

    return attend, without_effect


def block_topk(blocks: int, block_q: int = 128, block_kv: int = 128) -> Made:
    """The top `blocks` key blocks by pooled scores, the first block and the diagonal."""
    check_int("blocks", blocks, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        grid = BlockGrid.of(q, k, block_q, block_kv, causal=True)
        chosen = selection.top_k_blocks(selection.block_scores(q, k, grid), blocks)
        mask = grid.mask(chosen | grid.sink(1) | grid.diagonal())
        return block_sparse_attention(q, k, v, mask, scale=call.scale)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if blocks * block_kv >= keys:
            yield (
                "blocks",
                f"blocks = {blocks} has no effect: blocks of {block_kv} keys cover all {keys} keys",
            )

    return attend, without_effect


def anchor(theta: float = 12.0, step: int = 16, block: int = 128) -> Made:
    """`patterns.anchor_attention`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        result = patterns.anchor_attention(
            q, k, v, theta=theta, step=step, block=block, scale=call.scale
        )
        return result.out

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        # Distant blocks come after the first block and two or more blocks before a superblock.
        if (ceil_div(keys, block) - 1) // step * step <= 2:
            yield (
                "step",
                f"step = {step} and block = {block} have no effect: all {keys} keys are near",
            )

    return attend, without_effect


def vertical_slash(vertical: int = 1000, slash: int = 6096) -> Made:
    """`patterns.vertical_slash`."""
    options = inspect.signature(patterns.vertical_slash).parameters
    least = {"vertical": "first_columns", "slash": "last_diagonals"}
    forced: dict[str, int] = {name: options[of].default for name, of in least.items()}
    given = {"vertical": vertical, "slash": slash}

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        mask = patterns.vertical_slash(q, k, **given, scale=call.scale)
        return stripe_attention(q, k, v, mask, scale=call.scale)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        for name, value in given.items():
            if max(value, forced[name]) >= keys:
                yield name, f"{name} = {value} has no effect: it covers all {keys} keys"
            elif value < forced[name]:
                yield name, f"{name} = {value} has no effect: {forced[name]} are always taken"

    return attend, without_effect
