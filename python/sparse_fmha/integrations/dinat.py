"""DiNAT of transformers (Hugging Face) without NATTEN, by fused neighborhood attention.

from sparse_fmha.integrations import dinat, natten
natten.install()  # transformers makes the model only if it can import natten
model = DinatForImageClassification.from_pretrained("shi-labs/dinat-mini-in1k-224")
dinat.enable(model)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_fmha._checks import MAX_HEAD_DIM
from sparse_fmha._sizes import ceil_div
from sparse_fmha._versions import require

require("transformers", by=__name__, extra="transformers")

from transformers.models.dinat.modeling_dinat import NeighborhoodAttention

from sparse_fmha.attention import neighborhood_attention

__all__ = ["disable", "enable"]


class FusedNeighborhoodAttention(NeighborhoodAttention):  # type: ignore[misc]
    """DiNAT's attention, with its relative positional biases, in one call of the kernel.

    A bias depends on how many steps of the dilation a key lies from the query on each axis, at most
    K - 1 in both directions. So K' = 2K - 1 successive positions have different biases, and a
    position modulo K' says which. Each key gets K' * K' more channels, one for its own pair of
    residues: 1 there, else 0. In the same channels a query has the biases of such keys, so that
    the product q.k includes the bias, exactly.
    """

    def forward(
        self, hidden_states: Tensor, output_attentions: bool | None = False
    ) -> tuple[Tensor]:
        """`[B, Y, X, C]` to the same, in a tuple."""
        if output_attentions:
            raise NotImplementedError(
                "output_attentions must be False, because fused attention makes no maps, got True"
            )
        if self.training and self.dropout.p:
            raise NotImplementedError(
                f"attention_probs_dropout_prob must be 0 in training, got {self.dropout.p}; set it "
                "to 0 or call model.eval()"
            )
        projections = self.query, self.key, self.value
        heads = self.num_attention_heads
        q, k, v = (project(hidden_states).unflatten(-1, (heads, -1)) for project in projections)
        head_dim = q.shape[-1]
        biases, residues = self._bias_channels(q)
        q = torch.cat([q * head_dim**-0.5, biases.expand(*q.shape[:-1], -1)], -1)
        k = torch.cat([k, residues.expand(*k.shape[:-1], -1)], -1)
        v = nn.functional.pad(v, (0, q.shape[-1] - head_dim))
        options = {"dilation": self.dilation, "scale": 1.0}
        out: Tensor = neighborhood_attention(q, k, v, self.kernel_size, **options)
        return (out[..., :head_dim].flatten(-2),)

    def _bias_channels(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """For queries `[Y, X, heads, channels]`, for keys `[Y, X, 1, channels]`."""
        period, head_dim = 2 * self.kernel_size - 1, q.shape[-1]
        channels = 8 * ceil_div(head_dim + period**2, 8) - head_dim
        if head_dim + channels > MAX_HEAD_DIM:
            raise NotImplementedError(
                f"head dim + (2 * kernel_size - 1)**2 must be at most {MAX_HEAD_DIM}, got "
                f"{head_dim} + {period}**2"
            )
        residue = torch.arange(period, device=q.device)
        rows, columns = (
            torch.arange(length, device=q.device).div(self.dilation, rounding_mode="floor") % period
            for length in q.shape[1:3]
        )
        # Index of the bias: steps from the query to a key of the residue, plus K - 1.
        down = (residue - rows[:, None] + self.kernel_size - 1) % period
        right = (residue - columns[:, None] + self.kernel_size - 1) % period
        biases = self.rpb[:, down[:, None, :, None], right[None, :, None, :]]
        biases = biases.flatten(3).permute(1, 2, 0, 3)
        residues = nn.functional.one_hot(rows[:, None] * period + columns, period**2)
        room = (0, channels - period**2)
        return (
            nn.functional.pad(biases, room).to(q.dtype),
            nn.functional.pad(residues, room).to(q.dtype)[:, :, None],
        )


def enable(model: nn.Module) -> None:
    """Replaces the neighborhood attention of a DiNAT, also inside another model.

    Weights stay as they are, and with them `state_dict`. The result is that of NATTEN's unfused
    functions (before 0.20) up to rounding, with gradients, and no attention maps are made.

    In its forward the model then raises NotImplementedError for output_attentions, for dropout of
    attention maps in training, and where the head dim and the biases do not fit: with windows of 7
    that is above a head dim of 80 (published models have 32).

    Raises:
        TypeError: there is none of DiNAT's attention modules in the model.
    """
    _change(model, NeighborhoodAttention, FusedNeighborhoodAttention)


def disable(model: nn.Module) -> None:
    """Undoes `enable`.

    Raises:
        TypeError: the model is not enabled.
    """
    _change(model, FusedNeighborhoodAttention, NeighborhoodAttention)


def _change(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    found = [module for module in model.modules() if type(module) is old]
    if not found:
        raise TypeError(
            f"model must have a {old.__name__} of DiNAT, got {type(model).__name__} without one"
        )
    for module in found:
        module.__class__ = new
