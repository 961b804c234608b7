"""Problems of block-sparse attention: lists drawn at random, and what they mean token by token."""

import dataclasses
import itertools

import torch
from named_case import NamedCase
from poison import poisoned

import sparse_fmha
from sparse_fmha import reference

DTYPES = (torch.float16, torch.bfloat16)
ROWS = ((64, DTYPES[0]), (96, DTYPES[1]), (128, DTYPES[1]), (256, DTYPES[0]))  # kernels differ
BLOCKS = tuple(itertools.product((64, 128), (16, 32, 64, 128)))
NONE, FULL, PARTIAL = range(3)


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    len_q: int
    len_kv: int
    blocks: tuple[int, int] = (128, 128)
    full: float = 0.4  # share of the blocks that are listed as full
    partial: float = 0.0
    causal: bool = False
    batch: int = 1
    heads: int = 2
    heads_kv: int = 1
    shared_batch: bool = False  # one list for all batch entries
    shared_heads: bool = False
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    scale: float | None = None

    @property
    def grid(self):
        """[mB, mH, nQ, nK]."""
        lengths = zip((self.len_q, self.len_kv), self.blocks, strict=True)
        batch, heads = (
            1 if self.shared_batch else self.batch,
            1 if self.shared_heads else self.heads,
        )
        return batch, heads, *(-(-length // block) for length, block in lengths)

    def sizes(self):
        return self.batch, self.len_q, self.len_kv, self.heads, self.heads_kv, self.dim, self.dtype

    def kinds(self, seed=0):
        """NONE, FULL or PARTIAL for each block, at random."""
        drawn = torch.rand(self.grid, generator=torch.Generator().manual_seed(seed))
        kinds = torch.full(self.grid, NONE)
        kinds[drawn < self.full + self.partial] = PARTIAL
        kinds[drawn < self.full] = FULL
        return kinds

    def lists(self, kinds=None, seed=0):
        """Lists on the CPU, of blocks drawn at random where no kinds are given.

        Beyond the counts are blocks that are not listed, and bits. Of the bits some are all set,
        some are not set at all; they go on beyond the ends of queries and keys.
        """
        kinds = self.kinds(seed) if kinds is None else kinds
        counts, indices = compact(kinds == FULL)
        partial = None, None, None
        if (kinds == PARTIAL).any():
            some, where = compact(kinds == PARTIAL)
            partial = some, where, _bits((*where.shape, *self.blocks), seed)
        return Lists(self, counts, indices, *partial)


@dataclasses.dataclass(frozen=True)
class Lists:
    case: Case
    counts: torch.Tensor
    indices: torch.Tensor
    partial_counts: torch.Tensor | None = None
    partial_indices: torch.Tensor | None = None
    partial_bits: torch.Tensor | None = None

    def with_(self, **changes):
        return dataclasses.replace(self, **changes)

    def of(self, **changes):
        """The same lists for another head dim, dtype or scale."""
        return self.with_(case=self.case.with_(**changes))

    def tensors(self, device):
        """The five tensors, in the order of the op's arguments."""
        names = ("counts", "indices", "partial_counts", "partial_indices", "partial_bits")
        given = (getattr(self, name) for name in names)
        return [None if x is None else x.to(device) for x in given]

    def arguments(self, device):
        """What the op takes after q, k and v."""
        return *self.tensors(device), *self.case.blocks, self.case.causal, self.case.scale

    def mask(self, device, **options):
        """The BlockMask."""
        counts, indices, *partial = self.tensors(device)
        names = ("partial_counts", "partial_indices", "partial_bits")
        case = self.case
        return sparse_fmha.BlockMask(
            *(counts, indices, case.len_q, case.len_kv, *case.blocks),
            **dict(zip(names, partial, strict=True)), causal=case.causal, **options,
        )  # fmt: skip

    def visible(self):
        """Bool [mB, mH, len_q, len_kv], by the definition."""
        case, pairs = self.case, None
        if self.partial_bits is not None:
            pairs = unpacked(self.partial_bits)
        return reference.block_sparse_mask(
            *(self.counts, self.indices, case.len_q, case.len_kv, *case.blocks),
            *(self.partial_counts, self.partial_indices, pairs, case.causal),
        )


def compact(chosen):
    """Counts and ascending indices of what is set in each row; behind them, what is not set."""
    counts = chosen.sum(-1, dtype=torch.int32)
    width = min(int(counts.max()) + 1, chosen.shape[-1]) if counts.numel() else 0
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return counts, indices[..., :width].int().contiguous()


def unpacked(bits):
    """Bool [..., block_q, block_kv]: column c of a row is bit c % 8 of byte c // 8."""
    return ((bits[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2).bool()


def _bits(shape, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    *entries, rows, columns = shape
    full = *entries, rows, columns // 8

    def drawn():
        return torch.randint(256, full, dtype=torch.uint8, generator=generator)

    kind = torch.randint(5, (*entries, 1, 1), generator=generator)
    bits = torch.where(kind == 0, drawn() & drawn() & drawn(), drawn())
    return bits.masked_fill(kind == 1, 0).masked_fill(kind == 2, 255)


def attend(lists, q, k, v):
    """(out, lse) of block_sparse_attention, computed in memory that held NaN before."""
    mask = lists.mask(q.device)
    with poisoned():
        return sparse_fmha.block_sparse_attention(
            q, k, v, mask, scale=lists.case.scale, return_lse=True
        )


def attend_raw(lists, q, k, v):
    """The same of the op, which checks no entry of the lists."""
    arguments = lists.arguments(q.device)
    with poisoned():
        return torch.ops.sparse_fmha.block_sparse_fwd(q, k, v, *arguments)


def checker(make_qkv, agrees):
    """check(lists, given, run, visible): (out, lse), on the tensors given, which agree with fp64.

    `run` is attend or attend_raw; without `visible` the lists say what is visible.
    """

    def check(lists, given=None, run=attend, visible=None):
        __tracebackhide__ = True
        print(lists.case)  # what is shown last is what failed
        q, k, v = given or make_qkv(*lists.case.sizes())
        out, lse = run(lists, q, k, v)
        visible = (lists.visible() if visible is None else visible).to(q.device)
        agrees(out, lse, q, k, v, scale=lists.case.scale, visible=visible)
        return out, lse

    return check


def close(result, expected):
    """Equal to the rounding of weights and results."""
    eps = torch.finfo(result.dtype).eps
    atol = 2 * eps * expected.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=2 * eps, atol=atol)


def same(results, expected):
    return all(a.equal(b) for a, b in zip(results, expected, strict=True))
