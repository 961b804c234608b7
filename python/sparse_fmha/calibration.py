"""Skip thresholds for a target sparsity, calibrated on a model's queries and keys.

Source: "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", arXiv:2512.12087.
The sparsity S at a threshold lambda depends on lambda * L, where L is the number of keys:
`lambda * L = alpha * exp(beta * S)`, fitted separately for prefill and decode.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

from sparse_fmha._checks import check_int, check_number
from sparse_fmha._routing.collector import Collector
from sparse_fmha.skipping import checks, law, published
from sparse_fmha.skipping.checks import PHASES
from sparse_fmha.skipping.law import LEAST, MOST, Fit, Point
from sparse_fmha.skipping.tiles import (
    DECODE_TILE_K,
    GROUP,
    THRESHOLDS,
    TILE_K,
    decode_sparsity,
    tile_sparsity,
)

VERSION = 1

__all__ = [
    "DECODE_TILE_K",
    "GROUP",
    "LEAST",
    "MOST",
    "THRESHOLDS",
    "TILE_K",
    "Calibration",
    "Fit",
    "Point",
    "decode_sparsity",
    "tile_sparsity",
]


class Calibration:
    """Measured sparsities and the law fitted to them.

    Args:
        points: initial measurements; `add` and `collect` append more.
        thresholds: the thresholds to measure on each attention call, in [0, 1), at least one
            above 0.

    Raises:
        ValueError: a threshold or a number in a point is out of range, or a phase is unknown.
        TypeError: points or thresholds have the wrong type.
    """

    def __init__(
        self, points: Iterable[Point] = (), *, thresholds: Sequence[float] = THRESHOLDS
    ) -> None:
        self.points = [Point(*point) for point in points]
        for i, point in enumerate(self.points):
            checks.check_point(f"points[{i}]", point)
        self.thresholds = checks.check_fitted_thresholds(thresholds)

    def add(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Measures one attention call over all heads and batch entries together.

        The phase is "decode" if q has one token, and counts are those of `decode_sparsity`; else
        it is "prefill", and they are those of `tile_sparsity`, whose arguments and errors these
        are. Waits for the device.
        """
        decodes = q.shape[1:2] == (1,)
        if decodes:  # and sees all keys, causal or not
            skipped, visited = decode_sparsity(q, k, self.thresholds, scale=scale)
        else:
            skipped, visited = tile_sparsity(q, k, self.thresholds, causal=causal, scale=scale)
        tiles = int(visited.sum())
        phase = PHASES[decodes]
        for threshold, count in zip(self.thresholds, skipped.sum((0, 1)).tolist(), strict=True):
            share = count / max(1, tiles)
            self.points.append(Point(phase, k.shape[1], threshold, share, tiles))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Collector]:
        """Context manager that measures each attention call of a model as `add` does.

        It intercepts `torch.nn.functional.scaled_dot_product_attention` and
        `sparse_fmha.attention`. The collector that it yields has `measured`, the number of measured
        calls, and `passed_over`, the calls that could not be measured, counted by reason, such as a
        mask tensor. Results and errors of the calls do not change; a call that raises is not
        measured. Calls that `sdpa` would refuse are passed over, except for dropout and gradients,
        which do not change the scores. Calls inside `torch.compile` are counted as passed over
        when they are compiled.
        """
        with Collector(self.add) as collector:
            yield collector

    def collect(
        self, run: Callable[[object], object], inputs: Sequence[object], *, progress: bool = True
    ) -> Collector:
        """Calls `run(x)` for each input and measures its attention calls.

        Args:
            run: a model, or a function that calls it.
            inputs: inputs of at least two different lengths, for a better fit.
            progress: show a progress bar; needs rich (the extra `demo`).

        Raises:
            ValueError: no attention call could be measured.
            TypeError: run is not callable.
            ImportError: `progress` is set and rich is not installed.
        """
        if not callable(run):
            raise TypeError(f"run must be a function of one input, got {run!r}")
        shown = inputs
        if progress:
            try:
                from rich.progress import track
            except ImportError as error:
                raise ImportError(
                    "progress=True needs rich, which is not installed; install sparse_fmha[demo] "
                    "or pass progress=False"
                ) from error
            shown = track(inputs, description="calibrating")
        with self.collecting() as collector:
            for x in shown:
                run(x)
        if not collector.measured:
            reasons = ", ".join(f"{n} with {why}" for why, n in collector.passed_over.items())
            raise ValueError(
                "no attention call was measured" + (f"; passed over: {reasons}" if reasons else "")
            )
        return collector

    def fit(self, phase: str = "prefill", gamma: float | None = 1.0) -> Fit:
        """Fits the law for a phase by least squares in ln(lambda).

        Measurements with the same length and threshold are pooled first. Only points with 10% to
        90% of the tiles skipped are used.

        Args:
            phase: "prefill" or "decode".
            gamma: exponent with which the threshold falls with length, at least 0. None fits gamma
                too, from several lengths. 1 is the paper's value: sparsity grows in proportion to
                length.

        Raises:
            ValueError: an unknown phase, a gamma below 0, fewer than two distinct usable points,
                points of one length only where gamma is fitted, or points where a larger threshold
                does not give more sparsity.
            TypeError: gamma is not a number.
        """
        checks.check_phase(phase)
        checks.check_gamma(gamma)
        return law.fit(self.points, phase, gamma)

    def threshold_for(
        self, sparsity: float, length: int, phase: str = "prefill", gamma: float | None = 1.0
    ) -> float:
        """Returns the threshold that skips a fraction `sparsity` of the tiles at `length` keys.

        `phase` and `gamma` are those of `fit`.

        Raises:
            ValueError: a sparsity outside [0, 1), a length below 1, a resulting threshold of 1 or
                more, which skipping does not allow, or an error of `fit`.
            TypeError: sparsity is not a number or length is not an int; or an error of `fit`.
        """
        check_number("sparsity", sparsity, 0, 1)
        if sparsity == 1:
            raise ValueError(f"sparsity must be at least 0 and less than 1, got {sparsity}")
        check_int("length", length, 1)
        checks.check_phase(phase)
        checks.check_gamma(gamma)
        if sparsity == 0:
            return 0.0
        return law.threshold_for(self.fit(phase, gamma), sparsity, length)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the points as JSON, with the fits for human readers."""
        fits = {}
        for phase in PHASES:
            try:
                fits[phase] = self.fit(phase)._asdict()
            except ValueError:
                continue  # too few points of this phase
        content = {
            "version": VERSION,
            "law": "threshold * length**gamma = alpha * exp(beta * sparsity)",
            "fits": fits,
            "points": [point._asdict() for point in self.points],
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Reads a file written by `save`.

        Raises:
            ValueError: the file is not JSON, has another version or structure, or has numbers out
                of range.
        """
        try:
            content = json.loads(Path(path).read_text())
        except ValueError as problem:
            raise ValueError(f"{path} must be a saved Calibration: {problem}") from problem
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"{path} must be a saved Calibration of version {VERSION}")
        try:
            return cls(Point(**point) for point in content["points"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"{path} must be a saved Calibration: {problem}") from problem

    @classmethod
    def published(cls, model: str) -> Calibration:
        """Thresholds that were published for a model, by its name on the Hub.

        For "Qwen/Qwen3-30B-A3B-Instruct-2507", from TensorRT-LLM's blog on skip softmax attention.
        They were measured with tiles of 128 x 128; the kernels here have others, so that other
        shares are skipped.

        Raises:
            ValueError: there are none for this model.
        """
        return cls(published.points(model))

    @classmethod
    def of(cls, given: Calibration | str | PathLike[str]) -> Calibration:
        """A calibration itself, that of a model of `published` by its name, or that of a file."""
        if isinstance(given, Calibration):
            return given
        named = isinstance(given, str) and given in published.PUBLISHED
        return cls.published(str(given)) if named else cls.load(given)

    def __repr__(self) -> str:
        lengths = sorted({point.length for point in self.points})
        return f"Calibration({len(self.points)} points, lengths {lengths})"
