"""Methods of single layers that note what happens in them, while a model runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_fmha.cost.flops import PAIRS
from sparse_fmha.integrations._diffusion_hooks import Hooks, Settings
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_plan import Method, Plan
from sparse_fmha.integrations._diffusion_steps import Steps

LISTS = ("counts", "indices", "columns", "range_counts", "range_starts")
MECHANISMS = ("fmha", "neighborhood", "block_sparse", "stripe")


class Watched:
    """Base of such methods: in place of one layer's own."""

    in_graph = False

    def __init__(self, own: Method) -> None:
        self.own = own

    def check(self, layout: Layout) -> None:
        self.own.check(layout)

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from self.own.without_effect(layout)

    def prepared(self, layout: Layout, device: torch.device) -> Any:
        raise NotImplementedError


class Running:
    """A method for one call of a layer: q, k, v and the rest as of `Dense` to its output."""

    in_graph = False

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute = compute

    @torch.compiler.disable(reason="the model is being watched")  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Tensor:
        return self.compute(*args)


@contextlib.contextmanager
def watching(
    model: nn.Module,
    name: str,
    methods: Sequence[Any],
    settings: Settings,
    steps: Steps,
    later: Sequence[Sequence[Any]] = (),
) -> Iterator[None]:
    """Gives each layer a method of its own, or None, while the context is open; with `later` those
    of each sparse step."""
    numbers = itertools.count()
    of_layer = tuple(None if method is None else next(numbers) for method in methods)
    plan = Plan(tuple(method for method in methods if method is not None), of_layer)
    by_step = tuple(tuple(each for each in own if each is not None) for own in later)
    given = replace(settings, plan=plan, later=by_step, verbose=False)
    own = Hooks(name, given, steps, steps.reports)
    own.add(model)
    try:
        yield
    finally:
        own.remove(model)


def errors(out: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Of each head `[H]`: the sum of squares of the difference, and of the exact result."""
    exact = exact.float()
    difference = (out.float() - exact).square().sum((0, 1, 3), dtype=torch.float64)
    return difference.cpu(), exact.square().sum((0, 1, 3), dtype=torch.float64).cpu()


class Pairs(TorchDispatchMode):
    """Adds up the pairs of a query and a key that the ops of each head compute, masked or not."""

    whole_heads = True  # see `head_parts`

    def __init__(self, heads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_head = torch.zeros(heads, dtype=torch.float64, device="cpu")

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.name().removeprefix("sparse_fmha::").partition(".")[0]
        mechanism = name.removesuffix("_symbolic").removesuffix("_fwd")
        if name != mechanism and mechanism in MECHANISMS:
            self.by_head += self._pairs(mechanism, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _pairs(self, mechanism: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        arguments = func._schema.arguments
        given = {a.name: a.default_value for a in arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        heads = given["q"].shape[-2]
        for name, value in given.items():  # pairs are read on the host
            if isinstance(value, Tensor) and name.removeprefix("partial_") in LISTS:
                given[name] = value.cpu()
        found = []
        for head in range(heads):
            own = dict(given, q=given["q"].narrow(-2, head, 1))
            for name, value in given.items():
                lists = isinstance(value, Tensor) and name.removeprefix("partial_") in LISTS
                if lists and value.shape[1] == heads > 1:
                    own[name] = value.narrow(1, head, 1)
            found.append(PAIRS[mechanism](own))
        return torch.tensor(found, dtype=torch.float64, device="cpu")


def image_of(x: Tensor, layout: Layout) -> Tensor:
    """The rows of the grid's queries."""
    return layout.queries.split(x)[0]
