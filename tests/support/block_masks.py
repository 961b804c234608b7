"""Block lists for the tests: drawn at random, with what they mean token by token."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from sparse_fmha import BlockMask, reference


@dataclass(frozen=True)
class Drawn:
    """Kinds of blocks: 0 not listed, 1 full, 2 partial."""

    q_len: int
    kv_len: int
    block_q: int = 128
    block_kv: int = 128
    batch: int = 1
    heads: int = 1
    causal: bool = False
    kinds: tuple[float, float, float] = (0.4, 0.3, 0.3)  # shares
    seed: int = 0

    def tensors(self):
        """kinds [batch, heads, nQ, nK], and the pairs that a block shows if it is partial."""
        rng = np.random.default_rng(self.seed)
        rows, columns = -(-self.q_len // self.block_q), -(-self.kv_len // self.block_kv)
        shape = (self.batch, self.heads, rows, columns)
        kinds = torch.from_numpy(rng.choice(3, shape, p=self.kinds))
        pairs = torch.from_numpy(rng.random((*shape, self.block_q, self.block_kv)) < 0.5)
        return kinds, pairs

    def lists(self, value):
        """counts, indices of the blocks of one kind, by plain loops."""
        kinds, _ = self.tensors()
        rows = [torch.nonzero(row == value)[:, 0] for row in kinds.flatten(0, 2)]
        width = max([len(row) for row in rows], default=0) + self.seed % 2
        indices = torch.full((len(rows), width), -1, dtype=torch.int32)
        for row, listed in zip(indices, rows, strict=True):
            row[: len(listed)] = listed
        counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        return counts.view(kinds.shape[:3]), indices.view(*kinds.shape[:3], width)

    def mask(self):
        _, pairs = self.tensors()
        counts, indices = self.lists(2)
        bits = np.packbits(pairs.numpy(), axis=-1, bitorder="little")
        slots = indices.clamp(min=0).long().numpy()[..., None, None]
        return BlockMask(
            *self.lists(1),
            *self.sizes,
            causal=self.causal,
            partial_counts=counts,
            partial_indices=indices,
            partial_bits=torch.from_numpy(np.take_along_axis(bits, slots, 3)),
        )

    @property
    def sizes(self):
        return self.q_len, self.kv_len, self.block_q, self.block_kv

    def dense(self):
        """The oracle: bool [batch, heads, q_len, kv_len]."""
        _, pairs = self.tensors()
        counts, indices = self.lists(2)
        slots = indices.clamp(min=0).long()[..., None, None]
        masks = pairs.gather(3, slots.expand(*indices.shape, self.block_q, self.block_kv))
        full = self.lists(1)
        return reference.block_sparse_mask(
            *full, *self.sizes, counts, indices, masks, causal=self.causal
        )


@st.composite
def drawn(draw, longest=300, batch=2, heads=2):
    return Drawn(
        draw(st.integers(1, longest)),
        draw(st.integers(1, longest)),
        draw(st.sampled_from([64, 128])),
        draw(st.sampled_from([16, 32, 64, 128])),
        draw(st.integers(1, batch)),
        draw(st.integers(1, heads)),
        draw(st.booleans()),
        draw(
            st.sampled_from(
                [(0.4, 0.3, 0.3), (0.8, 0.1, 0.1), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0.5, 0.5, 0)]
            )
        ),
        draw(st.integers(0, 1 << 30)),
    )
