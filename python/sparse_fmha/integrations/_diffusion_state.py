"""What a running call of an enabled transformer tells its attention.

A hook around the transformer's forward fills a `State`; the processors of its self-attention read
it. All of it is plain attributes, which torch.compile traces and guards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_fmha.integrations._diffusion_layout import Layout, Runs, runs_of
from sparse_fmha.integrations._diffusion_methods import Dense, Sparse

# A method, q, k, v, the layout, the mask and the scale to out like q.
Masked = Callable[[Dense | Sparse, Tensor, Tensor, Tensor, Layout, Tensor, float | None], Tensor]


@dataclass
class Call:
    """One forward call of an enabled transformer."""

    model: str
    layout: Layout
    methods: tuple[Dense | Sparse, ...]  # one or more for its layers
    dense: bool  # this call runs the original attention
    alone: bool = False  # some layers have the tokens of the grid alone
    cut: str | None = None  # how context parallelism cuts the tokens
    masked: Masked | None = None  # attention under a mask of the model's own kind
    seen: dict[int, tuple[Tensor, list[Runs]]] = field(default_factory=dict)
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def key_mask(self, mask: Tensor) -> Tensor:
        """Bool `[B, 1, 1, tokens]` from a mask `[B, text]` of text behind the grid; the same
        tensor for all layers of a call, unless it is compiled."""
        if torch.compiler.is_compiling():
            return self._padded(mask)
        if id(mask) not in self.masks:
            self.masks[id(mask)] = mask, self._padded(mask)
        return self.masks[id(mask)][1]

    def _padded(self, mask: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(mask.bool(), (self.layout.image, 0), value=True)
        return padded[:, None, None]

    def runs(self, mask: Tensor | None, batch: int) -> list[Runs]:
        """What each batch entry sees of the plain tokens, those that are not padding.

        Most models pass one mask to all layers of a call, so this waits for the device only once.
        """
        if mask is None:
            return [self.layout.all_runs()] * batch
        if id(mask) not in self.seen:  # stored with its tensor, so that the id stays unique
            self.seen[id(mask)] = mask, self._read(mask, batch)
        return self.seen[id(mask)][1]

    def visible(self, mask: Tensor, batch: int) -> Tensor:
        """Bool `[batch, plain tokens]`, which compiled graphs take in place of `runs`; the check
        of the tokens on the grid is then the device's."""
        whole, visible = self._split(mask)
        torch._assert_async(whole.all(), self._hides(mask))
        return visible.expand(batch, -1)

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="this method reads the padding of the text on the host"
    )
    def _read(self, mask: Tensor, batch: int) -> list[Runs]:
        found = []
        for whole, *visible in torch.cat(self._split(mask), 1).tolist():
            if not whole:
                raise NotImplementedError(self._hides(mask))
            found.append(runs_of(visible))
        return found * batch if len(found) == 1 else found

    def _split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Whether all tokens of the grid are visible, and which plain tokens are."""
        tokens = self.layout.tokens
        keys = mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)
        if mask.dtype != torch.bool or not keys or mask.shape[-1] != tokens:
            raise NotImplementedError(
                f"attn_mask must be a mask of padded text keys, bool [B, 1, 1, {tokens}], got "
                f"{self._named(mask)}"
            )
        image, plain = self.layout.split(mask.reshape(-1, tokens))
        return image.all(1, keepdim=True), plain

    def _hides(self, mask: Tensor) -> str:
        return (
            "attn_mask must hide only padding of the text, got one that hides image tokens: "
            f"{self._named(mask)}"
        )

    def _named(self, mask: Tensor) -> str:
        return f"{mask.dtype} {list(mask.shape)} in {self.model}"


class State(threading.local):
    """The running call of one enabled transformer in each thread, and the method of the running
    layer; a copy has none."""

    def __init__(self) -> None:
        # Runs in each thread: an attribute of the class would come into its dictionary later, in
        # a graph that is guarded by what is in it.
        self.call: Call | None = None
        self.method: Dense | Sparse | None = None

    def __reduce__(self) -> tuple[type[State], tuple[()]]:
        return State, ()


# The call whose self-attention is running in a thread; for the backend, which gets no processor.
CURRENT = State()
