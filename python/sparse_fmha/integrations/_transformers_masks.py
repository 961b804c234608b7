"""Converts transformers' mask functions to plans of what the queries of a forward pass see.

transformers defines a mask as a function of indices, composed of known parts. Causal masks, sliding
windows, chunks, packed sequences and images whose tokens see each other are recognised from these
parts and, with the padding, converted to block lists; only blocks cut by an edge are evaluated pair
by pair. Any other function is evaluated at all pairs, some millions at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as hf

from sparse_fmha._sizes import ceil_div
from sparse_fmha.integrations._transformers_decode import seen_by_one
from sparse_fmha.integrations._transformers_plan import Plan, Runs
from sparse_fmha.masks.block_fields import TENSORS
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._static import from_map, from_rules

BLOCK = 128
MaskFunction = Callable[..., Tensor]  # of batch entry, head, query and key


@dataclass(frozen=True)
class Form:
    """A known mask function: the conditions for a pair to be visible."""

    causal: bool = False
    window: int | None = None  # key > query - window
    sequences: Tensor | None = None  # int64 [B, tokens]: query and key are in the same one
    positions: Tensor | None = None  # [B, tokens], to which causal and window refer
    chunk: int | None = None  # query and key are in the same of these chunks of keys,
    skipped: Tensor | None = None  # [B], which begin behind so much padding
    images: Tensor | None = None  # [B, tokens], -1 is none: pairs of one image, within the window,
    reach: int | None = None  # besides causal ones, with key > query - reach

    def on(self, tokens: int, keys: int) -> Form | None:
        """The form with chunks as sequences, for as many tokens as keys; else None."""
        if self.chunk is None or self.skipped is None:
            return self
        if tokens != keys:
            return None
        place = torch.arange(tokens, device=self.skipped.device) - self.skipped[:, None]
        chunks = place.div(self.chunk, rounding_mode="floor")
        return replace(self, sequences=chunks)


def plan(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = hf.causal_mask_function,
    attention_mask: Tensor | Plan | None = None,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> Plan | Tensor | None:
    """Called by transformers once for each kind of mask of a forward pass.

    Returns a `Plan`; for one query its keys (`_transformers_decode`), or, if the mask function is
    unknown or would have to be read in a compiled model, the mask of `sdpa_mask`. Reads padding and
    packed sequences, which waits for the device.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, device, kwargs: those
            of `sdpa_mask`.
        attention_mask: bool `[B, tokens seen]`, False is padding; or None; or a plan that was made
            before the model's call.
    """
    if isinstance(attention_mask, Plan):
        return attention_mask
    if q_length == 1:
        seen = _seen_by_one(
            batch_size, kv_length, q_offset, kv_offset, mask_function, attention_mask, device
        )
        if seen is not None:
            return seen
        mask_of_one: Tensor | None = hf.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
        return mask_of_one
    q_offset = int(q_offset)  # a tensor for a static cache
    keys = q_offset + q_length - kv_offset  # those that the last query may see
    form = read(mask_function)
    form = None if form is None else form.on(q_length, keys)
    if form is not None and form.images is not None and (q_offset or kv_offset):
        form = None
    if form is not None and not _fits(form, batch_size, q_length, kv_length, keys):
        form = None
    if form is None or not form.causal:
        keys = kv_length
    real = _padding(attention_mask, keys, kv_offset, device)
    if form is None:
        mask = _evaluated(
            mask_function, real, batch_size, q_length, keys, q_offset, kv_offset, device
        )
        return Plan(mask=mask, keys=keys, special="a mask of its own")
    if form.window is not None and form.window >= keys:
        form = replace(form, window=None)
    if form.sequences is not None and bool((form.sequences == form.sequences[:, :1]).all()):
        form = replace(form, sequences=None)  # torch.compile always sets them
    if form.images is not None and bool((form.images < 0).all()):
        form = replace(form, images=None)
    runs = None if real is None else _runs(real)
    made = Plan(causal=form.causal, keys=keys, runs=runs, special=_special(form, real, runs))
    if form.images is not None:
        return replace(made, mask=block_mask(form, real, q_length, keys, torch.device(device)))
    if real is None and form.window is None and form.sequences is None:
        return made
    # neighborhood_attention is used for windows of 2 keys or more and as many queries as keys.
    alone = real is None and form.sequences is None and q_length == keys
    if alone and form.window is not None and form.window >= 2:
        return replace(made, causal=False, window=form.window)
    return replace(made, mask=block_mask(form, real, q_length, keys, torch.device(device)))


def _seen_by_one(
    batch: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: MaskFunction,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """The keys that one query sees, if they are known without its mask."""
    form = read(mask_function)
    if form is None or (form.sequences, form.positions, form.images) != (None, None, None):
        return None
    real = attention_mask
    if real is not None:
        if torch.compiler.is_compiling():  # the answer would have to be read
            return None
        real = real.to(device=device, dtype=torch.bool)[:, kv_offset : kv_offset + kv_length]
    if not form.causal:
        return None if form.window is not None else seen_by_one(batch, kv_length, 0, real, device)
    own = q_offset - kv_offset  # the query's key
    first: int | Tensor = 0
    if form.window is not None:
        first = own - form.window + 1
        first = first.clamp(min=0) if isinstance(first, Tensor) else max(first, 0)
    return seen_by_one(batch, own + 1, first, real, device)


def read(function: MaskFunction) -> Form | None:
    """The form of a mask function of transformers, or None if it is unknown.

    Its parts are recognised by the function that made them and by their closures. If another
    version makes them differently, they are unknown, and the mask is evaluated, which is as
    correct.
    """
    if function is hf.bidirectional_mask_function:
        return Form()
    if function is hf.causal_mask_function:
        return Form(causal=True)
    if not inspect.isfunction(function) or function.__module__ != hf.__name__:
        return None
    made_by = function.__qualname__.partition(".<locals>")[0]
    held = inspect.getclosurevars(function).nonlocals
    if made_by == "sliding_window_overlay" and isinstance(held.get("sliding_window"), int):
        return Form(window=held["sliding_window"])
    if made_by == "chunked_overlay":
        chunk, skipped = held.get("chunk_size"), held.get("left_padding")
        known = isinstance(chunk, int) and isinstance(skipped, Tensor)
        return Form(chunk=chunk, skipped=skipped) if known else None
    if made_by == "or_masks" and len(held.get("mask_functions", ())) == 2:
        inner, images = read(held["mask_functions"][0]), _images(held["mask_functions"][1])
        if inner is None or images is None or inner != Form(causal=True, window=inner.window):
            return None
        return Form(causal=True, images=images, reach=inner.window)
    if made_by == "packed_sequence_mask_function" and "packed_sequence_mask" in held:
        return Form(sequences=held["packed_sequence_mask"])
    if made_by == "remap_positions_for_packed_sequence" and held.keys() >= {
        "mask_function",
        "position_ids",
    }:
        form = read(held["mask_function"])
        own = form is not None and (form.sequences, form.positions, form.chunk)
        if form is not None and own == (None, None, None):
            return replace(form, positions=held["position_ids"])
    if made_by == "and_masks" and "mask_functions" in held:
        given = [read(part) for part in held["mask_functions"]]
        parts = [part for part in given if part is not None]
        if len(parts) == len(given):
            return _joined(parts)
    return None


def _images(function: MaskFunction) -> Tensor | None:
    """The images of the tokens, of the function by which those of one image see each other."""
    if not inspect.isfunction(function) or function.__module__ != hf.__name__:
        return None
    if function.__qualname__.partition(".<locals>")[0] != "blockwise_overlay":
        return None
    images = inspect.getclosurevars(function).nonlocals.get("block_sequence_ids")
    return images if isinstance(images, Tensor) and images.dim() == 2 else None


def _joined(parts: list[Form]) -> Form | None:
    with_images = [part for part in parts if part.images is not None]
    if with_images:
        windows = [part.window for part in parts if part.window is not None]
        others = [
            part for part in parts if part.images is None and part != Form(window=part.window)
        ]
        if len(with_images) > 1 or others:
            return None
        return replace(with_images[0], window=min(windows, default=None))
    windows = [part.window for part in parts if part.window is not None]
    sequences = [part.sequences for part in parts if part.sequences is not None]
    positions = [part.positions for part in parts if part.positions is not None]
    chunks = [part for part in parts if part.chunk is not None]
    if len(sequences) > 1 or len(positions) > 1:
        return None
    if len(chunks) > 1 or (chunks and (sequences or positions)):
        return None
    return Form(
        causal=any(part.causal for part in parts),
        window=min(windows, default=None),
        sequences=(*sequences, None)[0],
        positions=(*positions, None)[0],
        chunk=chunks[0].chunk if chunks else None,
        skipped=chunks[0].skipped if chunks else None,
    )


def _fits(form: Form, batch: int, q_len: int, kv_len: int, keys: int) -> bool:
    """Whether `block_mask` supports the form for these lengths."""
    if form.sequences is None and form.positions is not None:
        return False
    if not form.causal:
        return form.window is None and form.sequences is None
    if not q_len <= keys <= kv_len:
        return False
    if form.images is not None:
        later = form.images[:, keys:kv_len]  # of a cache with room, where no image goes on
        there = form.images.shape[0] == batch and q_len == keys <= form.images.shape[1]
        return there and bool((later < 0).all())
    if form.sequences is None:
        return True
    if form.sequences.shape != (batch, q_len) or q_len != keys:
        return False
    if form.positions is None:
        return True
    # If positions count up within each sequence, their differences equal those of indices.
    new, step = form.sequences.diff(dim=1), form.positions.diff(dim=1)
    return bool(((new > 0) | ((new == 0) & (step == 1))).all())


def _padding(
    attention_mask: Tensor | None, keys: int, offset: int, device: torch.device | str
) -> Tensor | None:
    """Bool `[B, keys]`, True for real tokens, or None if all are real."""
    if attention_mask is None:
        return None
    real = attention_mask.to(device=device, dtype=torch.bool)[:, offset : offset + keys]
    if real.shape[1] < keys:  # a cache longer than the tokens so far
        real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))
    return None if bool(real.all()) else real


def _runs(real: Tensor) -> Runs | None:
    """First and one past the last real token of each entry; None if there is padding between."""
    count = real.sum(1)
    first = real.int().argmax(1)
    last = real.shape[1] - real.flip(1).int().argmax(1)
    rows = torch.stack([count, first, last], 1).tolist()
    if any(0 < n != stop - start for n, start, stop in rows):
        return None
    return tuple((start, stop) if n else (0, 0) for n, start, stop in rows)


def _special(form: Form, real: Tensor | None, runs: Runs | None) -> str | None:
    if form.images is not None:
        return "image tokens that see each other"
    if form.window is not None:
        return "a sliding window"
    if form.sequences is not None:
        return "packed sequences" if form.chunk is None else "chunked attention"
    return "padding between tokens" if real is not None and runs is None else None


def block_mask(
    form: Form, real: Tensor | None, q_len: int, keys: int, device: torch.device
) -> BlockMask:
    """The block lists of a known form; causal aligns the last query with the last key."""
    causal = form.causal and form.images is None  # tokens of an image see later ones
    grid = BlockGrid(q_len, keys, BLOCK, BLOCK, causal=causal)
    shift = keys - q_len
    full = some = grid.reachable()[None]
    # Blocks in which distance alone does not decide whether a pair is visible.
    special_q, special_k = (torch.zeros(n, dtype=torch.bool, device="cpu") for n in grid.shape)
    least, most = grid.distances()
    if form.images is not None:
        images, reach = form.images[:, :keys].cpu(), keys if form.reach is None else form.reach
        one, listed = _pairs_of_images(images)
        full = one | ((least >= 0) & (most < reach))
        some = listed | ((most >= 0) & (least < reach))
        special_q = special_k = (_ends(images)[1] >= 0).any(0)
    if form.window is not None:
        full, some = full & (most < form.window), some & (least < form.window)
    if form.sequences is not None:
        low, high = _ends(form.sequences.cpu())
        one = (low == high)[:, :, None] & (low == high)[:, None]
        special_q = special_k = (low != high).any(0)
        full = full & one & (low[:, :, None] == low[:, None])
        some = some & (low[:, :, None] <= high[:, None]) & (high[:, :, None] >= low[:, None])
    if real is not None:
        low, high = _ends(real.int().cpu())
        full, some = full & (low == 1)[:, None], some & (high == 1)[:, None]
        special_k = special_k | (low == 0).any(0)

    def rule(entry: int) -> Callable[[Tensor, Tensor], Tensor]:
        def visible(q: Tensor, k: Tensor) -> Tensor:
            # The causal condition is applied separately, but for images.
            window = keys if form.window is None else form.window
            seen = k > q + shift - window
            if form.images is not None:
                own, reach = form.images[entry, q], keys if form.reach is None else form.reach
                same = (own == form.images[entry, k]) & (own >= 0)
                seen = seen & (same | ((k <= q) & (k > q - reach)))
            if form.sequences is not None:
                seen = seen & (form.sequences[entry, q] == form.sequences[entry, k])
            return seen if real is None else seen & real[entry, k]

        return visible

    rules = [rule(entry) for entry in range(full.shape[0])]
    # from_rules takes one list per head; here there is one per batch entry.
    kinds = from_map(full), from_map(some & ~full)
    sizes = (q_len, keys, BLOCK, BLOCK)
    mask = from_rules(rules, *kinds, special_q, special_k, *sizes, causal, device)
    lists: dict[str, Any] = {
        name: None if getattr(mask, name) is None else getattr(mask, name).transpose(0, 1)
        for name in TENSORS
    }
    return BlockMask(
        **lists, q_len=q_len, kv_len=keys, block_q=BLOCK, block_kv=BLOCK, causal=causal
    )


def _pairs_of_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of pairs within one image, and blocks that may have such pairs, bool `[B, nQ, nK]`.

    Args:
        images: integers `[B, tokens]`, which rise from image to image; -1 is none.
    """
    low, high = _ends(images)
    whole = (low == high) & (low >= 0)
    one = whole[:, :, None] & whole[:, None] & (low[:, :, None] == low[:, None])
    behind = torch.iinfo(images.dtype).max
    low = _ends(images.masked_fill(images < 0, behind))[0]  # of the image tokens alone
    return one, (low[:, :, None] <= high[:, None]) & (high[:, :, None] >= low[:, None])


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and maximum of each block of `[B, tokens]`."""
    missing = ceil_div(values.shape[1], BLOCK) * BLOCK - values.shape[1]
    last = values[:, -1:].expand(-1, missing)
    blocks: Tensor = torch.cat([values, last], 1).unflatten(1, (-1, BLOCK))
    return blocks.amin(2), blocks.amax(2)


def _evaluated(
    function: MaskFunction,
    real: Tensor | None,
    batch: int,
    q_len: int,
    keys: int,
    q_offset: int,
    kv_offset: int,
    device: torch.device | str,
) -> BlockMask:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = function(b, h, q + q_offset, k + kv_offset)
        return seen if real is None else seen & real[b, k]

    return BlockMask.from_mask_mod(visible, batch, 1, q_len, keys, device=device)
