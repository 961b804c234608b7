"""Budgets of a method by layer and head, chosen by the error that they make in runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_layout import Layout, Seen
from sparse_fmha.integrations._diffusion_methods import Dense
from sparse_fmha.integrations._diffusion_plan import Method
from sparse_fmha.integrations._diffusion_presets import Preset
from sparse_fmha.integrations._diffusion_watch import Running, Watched, errors, image_of

KEEP = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)


@dataclass(frozen=True)
class Budget:
    """An option that says how much a method computes.

    Attributes:
        values: that are tried, cheapest first.
        exact: the value with which nothing is left out.
        by_head: whether heads have values of their own.
    """

    option: str
    values: tuple[float, ...]
    exact: float
    by_head: bool = True


BUDGETS: dict[str, Budget] = {
    "cube_top_k": Budget("keep", KEEP, 1.0),
    "vsa": Budget("keep", KEEP, 1.0),
    "draft": Budget("keep", KEEP, 1.0),
    "subblock": Budget("keep", KEEP, 1.0),
    "skip": Budget("threshold", (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4), 0.0, by_head=False),
}


@dataclass
class Measured:
    """Of one layer: for each run and call the squares of differences and results.

    `lost` has `[values, heads]` and `size` `[heads]` by run and call.
    """

    runs: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


class Trial(Watched):
    """Dense attention of one layer, beside which a method is tried with all its budgets."""

    def __init__(self, tried: Sequence[Method], measured: Measured, every: int) -> None:
        super().__init__(tried[0])
        self.tried, self.measured, self.every = tried, measured, every
        self.calls = 0

    def prepared(self, layout: Layout, device: torch.device) -> Any:
        def compute(
            q: Tensor, k: Tensor, v: Tensor, layout: Layout, seen: Seen, scale: float | None
        ) -> Tensor:
            out = Dense()(q, k, v, layout, seen, scale)
            self.calls += 1
            if (self.calls - 1) % self.every == 0:
                with torch.no_grad():
                    self._try(out.detach(), q, k, v, layout, seen, scale)
            return out

        return Running(compute)

    def _try(
        self,
        exact: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> None:
        exact, lost = image_of(exact, layout), []
        for method in self.tried:
            own = method.prepared(layout, q.device)
            out = image_of(own(q, k, v, layout, seen, scale), layout)
            difference, size = errors(out, exact)
            lost.append(difference)
        self.measured.runs[-1].append((torch.stack(lost), size))


@dataclass
class Budgets:
    """What `calibrate` found.

    Attributes:
        method, options: that were tried, without the budget.
        budget: the name of the budget's option.
        wanted: the relative error that heads may have.
        chosen: fp64 `[layers, heads]`, the budgets.
        error: fp64 `[layers, heads]`, the relative error with them, over all runs.
        groups: what stability is over: the runs, or of one run its first and second half.
        same: share of heads that get the same budget from each group alone.
        spread: mean over heads of the difference between the largest and the smallest of these.
        unseen: the largest relative error of a head in a group with the budgets of the others.
    """

    model: str
    method: str
    options: Mapping[str, Any]
    budget: str
    wanted: float
    chosen: Tensor
    error: Tensor
    groups: str
    same: float
    spread: float
    unseen: float
    by_head: bool
    first_dense_steps: float = 0

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """What `enable(layers=)` takes."""
        found = {}
        for layer, row in enumerate(self.chosen.tolist()):
            value = row if self.by_head else row[0]
            found[f"layer {layer}"] = {
                "method": self.method,
                **self.options,
                self.budget: value,
            }
        return found

    @property
    def preset(self) -> Preset:
        """What `enable(preset=)` takes."""
        return Preset("calibrated", layers=self.layers, **self._facts())

    def _facts(self) -> dict[str, Any]:
        return {
            "models": (self.model,),
            "first_dense_steps": self.first_dense_steps,
            "source": "sparse_fmha.integrations.diffusers.calibrate",
            "figure": (
                f"relative error of a head's output at most {self.wanted:g}, largest "
                f"{float(self.error.max()):.3g}; mean {self.budget} {float(self.chosen.mean()):.3g}"
            ),
            "note": (
                f"by {self.groups}: the same {self.budget} for {self.same:.0%} of heads, spread "
                f"{self.spread:.3g}; error with the {self.budget} of others at most "
                f"{self.unseen:.3g}"
            ),
        }

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the preset as a JSON file, whose path `enable(preset=)` takes.

        Raises:
            ValueError: the path does not end in .json.
            OSError: the file cannot be written.
        """
        where = Path(path)
        if where.suffix != ".json":
            raise ValueError(f"path must end in .json, got {where}")
        facts = {**self._facts(), "layers": self.layers}
        where.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return where


def made(
    model: str,
    method: str,
    options: Mapping[str, Any],
    values: Sequence[float],
    wanted: float,
    measured: Sequence[Measured],
    first_dense_steps: float = 0,
) -> Budgets:
    """Chooses budgets from what was measured in each layer."""
    budget = BUDGETS[method]
    table_of = [*values, budget.exact]

    def relative(groups: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
        """`[values + 1, layers, heads]`; the last is exact."""
        found = []
        for calls in groups:
            lost, size = (torch.stack(list(x)).sum(0) for x in zip(*calls, strict=True))
            if not budget.by_head:
                lost = lost.sum(-1, keepdim=True).expand_as(lost)
                size = size.sum(-1, keepdim=True).expand_as(size)
            each = (lost / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt()
            found.append(torch.nn.functional.pad(each, (0, 0, 0, 1)))
        return torch.stack(found, 1)

    def choose(error: Tensor) -> Tensor:
        """The first value whose error is allowed, `[layers, heads]`."""
        return (error <= wanted).int().argmax(0)

    pooled = relative([[call for run in layer.runs for call in run] for layer in measured])
    number = choose(pooled)
    parts: list[Sequence[Sequence[tuple[Tensor, Tensor]]]]
    count = len(measured[0].runs)
    if count > 1:
        parts = [[layer.runs[run] for layer in measured] for run in range(count)]
    else:
        halves = [len(layer.runs[0]) // 2 for layer in measured]
        both = list(zip(measured, halves, strict=True))
        parts = [[m.runs[0][:h] for m, h in both], [m.runs[0][h:] for m, h in both]]
        parts = parts if all(halves) else [[m.runs[0] for m in measured]]
    of_part = [relative(part) for part in parts]
    values_of = torch.tensor(table_of, dtype=torch.float64, device="cpu")
    alone = torch.stack([values_of[choose(error)] for error in of_part])
    unseen = 0.0
    for left, error in enumerate(of_part):
        others = [part for n, part in enumerate(parts) if n != left]
        joined = [[call for part in others for call in part[i]] for i in range(len(measured))]
        if others:
            own = choose(relative(joined))
            unseen = max(unseen, float(error.gather(0, own[None]).max()))
    return Budgets(
        model,
        method,
        dict(options),
        budget.option,
        wanted,
        values_of[number],
        pooled.gather(0, number[None])[0],
        f"{count} runs" if count > 1 else "the halves of one run",
        float((alone == alone[0]).all(0).double().mean()),
        float((alone.amax(0) - alone.amin(0)).mean()),
        unseen,
        budget.by_head,
        first_dense_steps,
    )


def tried(method: str, options: Mapping[str, Any], values: Sequence[float]) -> list[Method]:
    """The method with each budget."""
    name = BUDGETS[method].option
    return [table.make(method, {**options, name: value}) for value in values]
