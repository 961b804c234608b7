"""Thresholds of softmax skipping for a wanted sparsity, from a model's own queries and keys.

Source: "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", arXiv:2512.12087:
the sparsity that a threshold lambda gives depends on lambda * L, L the number of keys, and
`lambda * L = alpha * exp(beta * S)` for a sparsity S, fitted for prefill and for decoding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from sparse_fmha._checks import check_int, check_number
from sparse_fmha._routing.collector import Collector
from sparse_fmha.skipping import checks, law
from sparse_fmha.skipping.checks import PHASES
from sparse_fmha.skipping.law import LEAST, MOST, Fit, Point
from sparse_fmha.skipping.tiles import GROUP, THRESHOLDS, TILE_K, tile_sparsity

VERSION = 1

__all__ = [
    "GROUP",
    "LEAST",
    "MOST",
    "THRESHOLDS",
    "TILE_K",
    "Calibration",
    "Fit",
    "Point",
    "tile_sparsity",
]


class Calibration:
    """Measured sparsities, and the law fitted through them.

    Args:
        points: measurements; `add` and `collect` bring more.
        thresholds: what is tried on each attention call; in [0, 1), at least one above 0.

    Raises:
        ValueError: a threshold or a number of a point that is out of range, another phase.
        TypeError: points or thresholds of another type.
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
        """Measures one attention call, all heads and batch entries together.

        Its phase is "decode" where q has one token, else "prefill". Arguments and errors as
        `tile_sparsity`. Waits for the device.
        """
        skipped, visited = tile_sparsity(q, k, self.thresholds, causal=causal, scale=scale)
        tiles = int(visited.sum())
        phase = PHASES[q.shape[1] == 1]
        for threshold, count in zip(self.thresholds, skipped.sum((0, 1)).tolist(), strict=True):
            share = count / max(1, tiles)
            self.points.append(Point(phase, k.shape[1], threshold, share, tiles))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Collector]:
        """Inside, each attention call of a model is measured as by `add`.

        Seen are `torch.nn.functional.scaled_dot_product_attention` and `sparse_fmha.attention`; the
        collector that is returned has `measured`, the number of calls, and `passed_over`, those
        that could not be measured by their reason, such as a mask tensor. Each call returns or
        raises what it would without; one that raises is not measured. What `sdpa` would refuse is
        passed over, but for dropout and gradients, which do not change the scores. Calls inside
        `torch.compile` are passed over when they are compiled.
        """
        with Collector(self.add) as collector:
            yield collector

    def collect(
        self, run: Callable[[object], object], inputs: Sequence[object], *, progress: bool = True
    ) -> Collector:
        """Calls `run(x)` for each input, which should differ in length, and measures its calls.

        Args:
            run: a model, or a function that calls it.
            inputs: at least two lengths serve the fit best.
            progress: show a bar; needs rich (the extra `demo`).

        Raises:
            ValueError: not one attention call could be measured.
            TypeError: run cannot be called.
            ImportError: a bar is to be shown, and rich is not there.
        """
        if not callable(run):
            raise TypeError(f"run is {run!r}; a function of one input is needed")
        shown = inputs
        if progress:
            try:
                from rich.progress import track
            except ImportError as error:
                raise ImportError(
                    "progress is True and rich is not installed; install sparse_fmha[demo] or "
                    "pass progress=False"
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
        """The law for a phase, by least squares in ln(lambda).

        Measurements of one length and threshold are put together first. Those with 10% to 90% of
        the tiles skipped count.

        Args:
            phase: "prefill" or "decode".
            gamma: how the threshold falls with the length, at least 0; None fits that too, from
                several lengths. 1 is the paper's, where attention gets sparser in proportion to
                length.

        Raises:
            ValueError: an unknown phase, a gamma below 0, fewer than two such points that differ,
                points of one length where gamma is to be fitted, or points that a larger threshold
                does not make sparser.
            TypeError: gamma is no number.
        """
        checks.check_phase(phase)
        checks.check_gamma(gamma)
        return law.fit(self.points, phase, gamma)

    def threshold_for(
        self, sparsity: float, length: int, phase: str = "prefill", gamma: float | None = 1.0
    ) -> float:
        """The threshold that skips a share `sparsity` of the tiles at `length` keys.

        `phase` and `gamma` as `fit`.

        Raises:
            ValueError: a sparsity outside [0, 1), a length below 1, a threshold of 1 or more, which
                the rule of skipping does not have, or as `fit`.
            TypeError: a sparsity that is no number, a length that is no int; as `fit`.
        """
        check_number("sparsity", sparsity, 0, 1)
        if sparsity == 1:
            raise ValueError(f"sparsity is {sparsity}; 0 <= sparsity < 1 is needed")
        check_int("length", length, 1)
        checks.check_phase(phase)
        checks.check_gamma(gamma)
        if sparsity == 0:
            return 0.0
        return law.threshold_for(self.fit(phase, gamma), sparsity, length)

    def save(self, path: str | Path) -> None:
        """Writes the points, and for the reader the fits, as JSON."""
        fits = {}
        for phase in PHASES:
            try:
                fits[phase] = self.fit(phase)._asdict()
            except ValueError:
                continue  # too few points of it
        content = {
            "version": VERSION,
            "law": "threshold * length**gamma = alpha * exp(beta * sparsity)",
            "fits": fits,
            "points": [point._asdict() for point in self.points],
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            ValueError: a file of another version or shape, numbers out of range, or no JSON.
        """
        try:
            content = json.loads(Path(path).read_text())
        except ValueError as problem:
            raise ValueError(f"{path} is no calibration: {problem}") from problem
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"{path} is no calibration of version {VERSION}")
        try:
            return cls(Point(**point) for point in content["points"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"{path} is no calibration: {problem}") from problem

    def __repr__(self) -> str:
        lengths = sorted({point.length for point in self.points})
        return f"Calibration({len(self.points)} points, lengths {lengths})"
