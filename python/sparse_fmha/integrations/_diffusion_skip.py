"""Softmax skipping in self-attention over a grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike

from torch import Tensor

from sparse_fmha._checks import check_number
from sparse_fmha.attention import attention
from sparse_fmha.calibration import Calibration
from sparse_fmha.integrations._diffusion_beside import beside
from sparse_fmha.integrations._diffusion_layout import Layout, Seen
from sparse_fmha.integrations._diffusion_methods import Sparse

MOST = 1 - 2**-24


@dataclass(frozen=True)
class Skip(Sparse):
    """`attention` of the grid that skips tiles of small probability (BLASST).

    The threshold is given, or made from the share of tiles to skip and a calibration or its file,
    for each number of keys.
    """

    threshold: float | None = None
    sparsity: float | None = None
    calibration: Calibration | str | PathLike[str] | None = None
    measured: Calibration | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.sparsity is None):
            raise ValueError("exactly one of threshold and sparsity must be given for skip")
        if (self.sparsity is None) != (self.calibration is None):
            raise ValueError("sparsity and calibration must be given together for skip")
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0, MOST)
        if self.sparsity is not None and self.calibration is not None:
            check_number("sparsity", self.sparsity, 0, MOST)
            measured = Calibration.of(self.calibration)
            measured.fit()  # raises here, not in a model's call, if no law fits the points
            object.__setattr__(self, "measured", measured)

    def for_keys(self, keys: int) -> float:
        if self.measured is None or self.sparsity is None:
            assert self.threshold is not None
            return self.threshold
        return self.measured.threshold_for(self.sparsity, keys)

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        name = "threshold" if self.sparsity is None else "sparsity"
        if getattr(self, name) == 0:
            yield name, f"{name} = 0 has no effect: nothing is skipped"

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        q = layout.queries.split(q)[0]
        (k, plain_k), (v, plain_v) = layout.split(k), layout.split(v)
        threshold = self.for_keys(layout.image)
        if not layout.plain:
            return attention(q, k, v, scale=scale, skip_threshold=threshold)
        out, lse = attention(q, k, v, scale=scale, skip_threshold=threshold, return_lse=True)
        return beside(out, lse, q, plain_k, plain_v, layout, seen, scale)
