"""Light Forcing: chunks of a video attend to the frames before them, chosen in two levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import (
    check_collection,
    check_instance,
    check_int,
    check_number,
    check_q_and_k,
    plain_ints,
)
from sparse_fmha.masks import block_checks, block_lists, tensor_fields
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.tensor_fields import TensorFields
from sparse_fmha.patterns.regions import RegionOrder
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_blocks


@plain_ints
def light_forcing_sparsity(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    noise: Sequence[float],
    *,
    base: float,
    target: float,
) -> list[float]:
    """Returns the sparsity of each chunk of a video, so that all together have a wanted one.

    Chunk-aware growth: the first chunk is dense, the others have `s_i = base - noise_i * beta`,
    with the beta that solves, over the chunks from the second on,

        sum of (1 - s_i) * q_lens_i * kv_lens_i = (1 - target) * sum of q_lens_i * kv_lens_i.

    Source: "Light Forcing" (2026), arXiv:2602.04789. Its public repository has no code; whether the
    first chunk counts towards the target is left open, and here it does not.

    Args:
        q_lens, kv_lens: tokens of each chunk, and keys that it sees: earlier chunks and its own.
        noise: the paper's alpha, a number for each chunk, its noise level; the first is not used.
        base, target: sparsities, 0 to 1.

    Raises:
        ValueError: the sequences differ in length, a sparsity is not in [0, 1], or no noise is
            above 0.
        TypeError: an argument has a wrong type.
    """
    check_collection("q_lens", q_lens)
    check_collection("kv_lens", kv_lens)
    check_collection("noise", noise)
    if not len(q_lens) == len(kv_lens) == len(noise):
        raise ValueError(
            "q_lens, kv_lens and noise must have the same number of entries, got "
            f"{len(q_lens)}, {len(kv_lens)} and {len(noise)}"
        )
    check_number("base", base, 0, 1)
    check_number("target", target, 0, 1)
    pairs = [
        check_int(f"q_lens[{n}]", lq) * check_int(f"kv_lens[{n}]", lk)
        for n, (lq, lk) in enumerate(zip(q_lens, kv_lens, strict=True))
    ]
    levels = [check_number(f"noise[{n}]", x, 0, math.inf) for n, x in enumerate(noise)]
    if len(pairs) < 2:
        return [0.0] * len(pairs)
    weighted = sum(w * a for w, a in zip(pairs[1:], levels[1:], strict=True))
    if not weighted:
        raise ValueError(f"noise must have a number above 0 after the first, got {list(noise)}")
    beta = (base - target) * sum(pairs[1:]) / weighted
    found = [0.0] + [base - a * beta for a in levels[1:]]
    for n, each in enumerate(found):
        if not -1e-9 <= each <= 1 + 1e-9:
            raise ValueError(
                f"base, target and noise must give each chunk a sparsity from 0 to 1, got {base}, "
                f"{target} and {list(noise)}, which give chunk {n} {each:.4f}"
            )
    return [min(max(each, 0.0), 1.0) for each in found]


class LightForcingLayout(TensorFields):
    """How frames and key blocks cut each other, for `light_forcing`.

    A piece is what a key block has of a frame. `to`, saving and use as a pytree node work as for
    `BlockMask`.

    Attributes:
        pieces: `RegionOrder` of the keys by granules of `granule` keys, a region for each piece.
        granule: the most keys of which frames and key blocks are multiples.
        piece_frame: int64 `[pieces]`. ends: int64 `[nK + 1]`, the first piece of each block.
        cut: int64 `[nK]`, the number of each block among those with several pieces, else 0.
        cut_pieces: int64 `[cut blocks, block_kv]`, the piece of each key of these.
        q_len, kv_len, frame, block_q, block_kv: as given.

    Args:
        q_len: tokens of the chunk. kv_len: keys, those of the chunk last. Whole frames.
        frame: tokens of a frame, at least 1.
        block_q, block_kv: block sizes of the mask.
        device: device of the tensors.

    Raises:
        ValueError, TypeError: a size is not allowed.
    """

    TENSORS = ("pieces", "piece_frame", "ends", "cut", "cut_pieces")
    PLAIN = ("q_len", "kv_len", "frame", "block_q", "block_kv", "granule")

    @plain_ints
    def __init__(
        self,
        q_len: int,
        kv_len: int,
        frame: int,
        *,
        block_q: int = 128,
        block_kv: int = 128,
        device: torch.device | str = "cpu",
    ) -> None:
        block_checks.check_sizes(q_len, kv_len, block_q, block_kv, False)
        check_int("frame", frame, 1)
        for name, size in (("q_len", q_len), ("kv_len", kv_len)):
            if not size or size % frame:
                raise ValueError(
                    f"{name} must be a positive multiple of frame = {frame}, got {size}"
                )
        if q_len > kv_len:
            raise ValueError(f"q_len must be at most kv_len = {kv_len}, got {q_len}")
        self.q_len, self.kv_len, self.frame = q_len, kv_len, frame
        self.block_q, self.block_kv = block_q, block_kv
        token = torch.arange(kv_len, device="cpu")
        starts = (token % frame == 0) | (token % block_kv == 0)
        piece = starts.cumsum(0) - 1
        self.granule = granule = math.gcd(frame, block_kv)
        self.pieces = RegionOrder(piece[::granule], block_kv // granule, device=device)
        self.piece_frame = (token[starts] // frame).to(device)
        first = piece[::block_kv]
        ends = torch.cat([first, first.new_full((1,), self.pieces.regions)])
        cut = ends.diff() > 1
        self.ends = ends.to(device)
        self.cut = ((cut.cumsum(0) - 1) * cut).to(device)
        padded = torch.nn.functional.pad(piece, (0, -kv_len % block_kv), value=int(piece[-1]))
        self.cut_pieces = padded.view(-1, block_kv)[cut].to(device)


tensor_fields.register(LightForcingLayout, "sparse_fmha.patterns.LightForcingLayout")


@plain_ints
def light_forcing(
    q: Tensor,
    k: Tensor,
    layout: LightForcingLayout,
    *,
    sparsity: float = 0.85,
    frames: int = 6,
    sink: int = 1,
    recent: int = 1,
    scale: float | None = None,
) -> BlockMask:
    """Returns the mask of Light Forcing for a chunk of an autoregressive video model.

    For each query block r with mean q_r: 1. the frames with the `frames` largest
    `q_r . mean of k over the frame`, the first `sink` frames, the last `recent` frames before the
    chunk, and the chunk's own frames. 2. Of the key blocks in these frames, the
    `ceil((1 - sparsity) * nK)` with the largest `q_r . mean of k over the block`. Where a frame
    ends inside a key block, its parts are chosen apart, and a block with only some of them is
    masked by bits.

    The chunk's queries see each other in both directions. The first chunk is dense: `attention`.

    Source: "Light Forcing" (2026), arXiv:2602.04789, hierarchical sparse attention; 6, 9 or 12
    frames, and the sparsity of each chunk as from `light_forcing_sparsity`. Its public repository
    has no code. Left open are the sizes of blocks (128 in a re-implementation), the number of first
    and recent frames, and what happens to a block that a frame's end cuts. The re-implementation
    subtracts the mean of all keys before scoring and adds a branch of linear attention; both are
    left out.

    Args:
        q: `[B, q_len, Hq, D]`, the chunk. k: `[B, kv_len, Hkv, D]`, all frames up to the chunk's.
        layout: for these lengths, on q's device.
        sparsity: 0 to 1; at least one block is kept.
        frames, sink, recent: numbers of frames, at least 0.
        scale: of q.k. Its size has no effect, its sign has.

    Returns:
        A mask with lists for each batch entry and head, built without waiting for the device. It
        depends on q and k, but has no gradient to them.

    Raises:
        ValueError, TypeError: tensors do not match the layout, or a number is not allowed.
    """
    check_instance("layout", layout, LightForcingLayout)
    check_q_and_k(q, k)
    check_number("sparsity", sparsity, 0, 1)
    for name, number in (("frames", frames), ("sink", sink), ("recent", recent)):
        check_int(name, number)
    for name, x, length in (("q", q, layout.q_len), ("k", k, layout.kv_len)):
        if x.shape[1] != length:
            raise ValueError(f"{name} must have the {length} tokens of layout, got {x.shape[1]}")
    q_len, kv_len, frame = layout.q_len, layout.kv_len, layout.frame
    blocks = len(layout.ends) - 1
    keep = max(1, math.ceil((1 - sparsity) * blocks - 1e-9))
    with torch.no_grad():
        granules = pool_blocks(k, layout.granule)
        of_frames = pool_blocks(granules, frame // layout.granule)
        means = torch.cat([of_frames, layout.pieces.means(granules)], 1)
        scores = pooled_scores(pool_blocks(q, layout.block_q), means, scale=scale)
        of_frames, scores = scores.split([kv_len // frame, len(layout.piece_frame)], 3)
        near = torch.arange(kv_len // frame, device=q.device)
        other = (near >= sink) & (near < (kv_len - q_len) // frame - recent)
        unseen = (~top_k_blocks(of_frames, frames) & other).index_select(3, layout.piece_frame)
        chosen = top_k_blocks(scores.masked_fill(unseen, -torch.inf), keep)
        return _mask(chosen, layout, min(keep, len(layout.cut_pieces)))


def _mask(chosen: Tensor, layout: LightForcingLayout, width: int) -> BlockMask:
    """Returns the mask of the chosen pieces, bool `[B, H, nQ, pieces]`."""
    before = torch.nn.functional.pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))
    counts = before.index_select(3, layout.ends).diff()
    full = counts == layout.ends.diff()
    sizes = (layout.q_len, layout.kv_len, layout.block_q, layout.block_kv)
    lists = block_lists.list_blocks(full)
    if not width:
        return BlockMask(*lists, *sizes)
    partial = block_lists.list_blocks((counts > 0) & ~full, width)
    pieces = layout.cut_pieces[layout.cut[partial[1].clamp(min=0).long()]]
    columns = chosen.gather(3, pieces.flatten(3)).view(pieces.shape)
    bits = block_lists.pack_bits(columns)[..., None, :].expand(
        *pieces.shape[:4], layout.block_q, -1
    )
    return BlockMask(
        *lists, *sizes, partial_counts=partial[0], partial_indices=partial[1], partial_bits=bits
    )
