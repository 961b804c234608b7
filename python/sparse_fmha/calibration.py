"""Thresholds of softmax skipping for a wanted sparsity, from a model's own queries and keys.

Source: "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", arXiv:2512.12087:
the sparsity that a threshold lambda gives depends on lambda * L, L the number of keys, and
`lambda * L = alpha * exp(beta * S)` for a sparsity S, fitted for prefill and for decoding.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import check_int, check_number
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._routing.collector import Collector
from sparse_fmha._sizes import SLICE
from sparse_fmha.skipping import checks
from sparse_fmha.skipping.checks import PHASES

GROUP = 64  # query rows that skip together
TILE_K = 80  # keys of a tile of the dense kernels
# Twenty thresholds, evenly spaced in the exponent.
THRESHOLDS = tuple(float(t) for t in np.geomspace(1e-7, 0.9, 20))
# Points that are fitted: beyond these shares the law does not hold.
LEAST, MOST = 0.1, 0.9
VERSION = 1


class Point(NamedTuple):
    """One measurement: a threshold, and the share of tiles that it skips."""

    phase: str
    length: int  # keys
    threshold: float
    sparsity: float
    tiles: int  # that were visited: the weight of the point


class Fit(NamedTuple):
    """`lambda * L**gamma = alpha * exp(beta * S)`; gamma is 1 in the paper."""

    alpha: float
    beta: float
    gamma: float
    points: int
    error: float  # root of the mean squared difference in S


def tile_sparsity(
    q: Tensor,
    k: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    causal: bool = False,
    scale: float | None = None,
    tile_k: int = TILE_K,
) -> tuple[Tensor, Tensor]:
    """How many tiles `attention` would skip at each of many thresholds, by one pass over scores.

    A skipped tile never raises a row's maximum, so which tiles are skipped at one threshold does
    not depend on those before: of each tile the largest `mt - m` of a group's rows is compared with
    every ln(lambda). Nothing is kept of the scores but slices.

    Args:
        q: `[B, Lq, Hq, D]`. k: `[B, Lkv, Hkv, D]`, Hq a multiple of Hkv.
        thresholds: numbers in [0, 1).
        causal, scale: as `attention`.
        tile_k: keys of a tile; the default is that of `attention`'s kernels.

    Returns:
        skipped, int64 `[B, Hq, thresholds]`, and visited, int64 `[B, Hq]`, as `SkipStats` counts.

    Raises:
        ValueError, TypeError: as `attention`, for q and k; a threshold out of range, a `tile_k`
            below 1.
    """
    scale = _checks.check_attention(q, k, k, causal, scale)
    thresholds = checks.check_thresholds(thresholds)
    check_int("tile_k", tile_k, 1)
    (batch, q_len, heads, dim), (kv_len, heads_kv) = q.shape, k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    logs = [math.log(t) if t > 0 else -math.inf for t in thresholds]
    limits = torch.tensor(logs, dtype=torch.float64, device=q.device)
    skipped = torch.zeros(batch, heads, len(thresholds), dtype=torch.int64, device=q.device)
    visited = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
    if not (q.numel() and k.numel()):
        return skipped, visited
    widened = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = torch.arange(kv_len, device=q.device)
    step = max(GROUP, SLICE // max(1, kv_len * heads // heads_kv) // GROUP * GROUP)
    with torch.no_grad(), without_autocast(q.device):
        for b in range(batch):
            for head_kv in range(heads_kv):
                own = slice(head_kv * (heads // heads_kv), (head_kv + 1) * (heads // heads_kv))
                columns = k[b, :, head_kv].to(widened).T
                for first in range(0, q_len, step):
                    rows = q[b, first : first + step, own].transpose(0, 1).to(widened) * scale
                    scores = rows @ columns
                    if causal:
                        at = torch.arange(first, first + rows.shape[1], device=q.device)
                        hidden = keys > at[:, None] + (kv_len - q_len)
                        scores.masked_fill_(hidden, -torch.inf)
                    margins = _margins(scores, tile_k)
                    seen = margins > -torch.inf
                    visited[b, own] += seen.sum((1, 2))
                    under = margins[..., None].double() < limits
                    skipped[b, own] += (under & seen[..., None]).sum((1, 2))
    return skipped, visited


def _margins(scores: Tensor, tile_k: int) -> Tensor:
    """The largest `mt - m` of each group and tile, `[H, groups, tiles]`, of scores `[H, rows, L]`.

    Tiles from the last to the first; -inf where no row sees a key, inf where m is that of nothing.
    """
    _, rows, length = scores.shape
    pad = (0, -length % tile_k, 0, -rows % GROUP)
    scores = torch.nn.functional.pad(scores, pad, value=-torch.inf)
    top = scores.unflatten(2, (-1, tile_k)).amax(-1).flip(-1)  # [H, rows, tiles]
    before = top.cummax(-1).values.roll(1, -1)
    before[..., 0] = -torch.inf
    margin = torch.where(top == -torch.inf, top, top - before)
    return margin.unflatten(1, (-1, GROUP)).amax(2)


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
        sums: dict[tuple[int, float], list[float]] = {}
        for point in self.points:
            if point.phase == phase and point.tiles:
                both = sums.setdefault((point.length, point.threshold), [0.0, 0.0])
                both[0] += point.sparsity * point.tiles
                both[1] += point.tiles
        shares = {at: skipped / tiles for at, (skipped, tiles) in sums.items()}
        used = {at: s for at, s in shares.items() if LEAST <= s <= MOST and at[1] > 0}
        if len(set(used.values())) < 2:
            raise ValueError(
                f"there are {len(used)} points of {phase} with {LEAST:.0%} to {MOST:.0%} of the "
                "tiles skipped; two that differ are needed: add longer inputs or other thresholds"
            )
        sparsity = np.array(list(used.values()))
        log_length, log_threshold = np.log(np.array(list(used))).T
        columns = [np.ones_like(sparsity), sparsity]
        known = log_threshold
        if gamma is None:
            if len(set(log_length)) < 2:
                raise ValueError("gamma is None, and all points are of one length; two are needed")
            columns.append(-log_length)
        else:
            known = log_threshold + gamma * log_length
        (log_alpha, beta, *free), *_ = np.linalg.lstsq(np.stack(columns, 1), known, rcond=None)
        gamma = float(free[0]) if gamma is None else float(gamma)
        with np.errstate(over="ignore"):
            alpha = float(np.exp(log_alpha))
        if not (beta > 0 and 0 < alpha < math.inf):
            raise ValueError(
                f"the {len(used)} points of {phase} follow no law: alpha would be {alpha:.3g} and "
                f"beta {beta:.3g}, and both must be positive; add inputs or other thresholds"
            )
        found = (log_threshold + gamma * log_length - log_alpha) / beta
        error = float(np.sqrt(np.mean((found - sparsity) ** 2)))
        return Fit(alpha, float(beta), gamma, len(used), error)

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
        fit = self.fit(phase, gamma)
        free = fit.gamma * math.log(length) - math.log(fit.alpha)  # beta * sparsity at threshold 1
        with np.errstate(over="ignore"):
            threshold = float(np.exp(fit.beta * sparsity - free))
        if threshold >= 1:
            most = free / fit.beta
            raise ValueError(
                f"a sparsity of {sparsity:.0%} at {length} keys would take a threshold of "
                f"{threshold:.3g}; below 1 there is at most {max(0.0, most):.0%}"
            )
        return threshold

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
