"""Maps of the blocks that a mask must or may list."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_int, check_q_and_k, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists, tensor_fields
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.tensor_fields import TensorFields


class BlockGrid(TensorFields):
    """The blocks of a mask, with maps of forced or allowed blocks.

    A map is bool `[nQ, nK]`. A block is set if it holds at least one of the named pairs of tokens:
    tokens are rounded outwards to blocks. Query i is at the position of key `i + kv_len - q_len`.
    Combine maps by `|` with each other and with the blocks that `selection` chooses:

        grid = BlockGrid(q_len, kv_len, 128, 128, causal=True, device=q.device)
        mask = grid.mask(top_k_blocks(scores, 16) | grid.sink(64) | grid.local(256))

    No method waits for the device. `to`, saving and use as a pytree node (without leaves) work as
    for `BlockMask`.

    Args:
        q_len, kv_len, block_q, block_kv, causal: as in `BlockMask`.
        device: device of the maps.

    Raises:
        ValueError, TypeError: a size that `BlockMask` does not allow; a number of tokens below 0.
    """

    PLAIN = ("q_len", "kv_len", "block_q", "block_kv", "causal", "device")

    @plain_ints
    def __init__(
        self,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        causal: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        block_checks.check_sizes(q_len, kv_len, block_q, block_kv, causal)
        self.q_len, self.kv_len = q_len, kv_len
        self.block_q, self.block_kv = block_q, block_kv
        self.causal = causal
        self.device = torch.device(device)

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, block_q: int = 128, block_kv: int = 128, *, causal: bool = False
    ) -> BlockGrid:
        """Returns the grid for q `[B, q_len, Hq, D]` and k `[B, kv_len, Hkv, D]`, on q's device."""
        check_q_and_k(q, k)
        return cls(q.shape[1], k.shape[1], block_q, block_kv, causal=causal, device=q.device)

    @property
    def shape(self) -> tuple[int, int]:
        """nQ, nK."""
        return ceil_div(self.q_len, self.block_q), ceil_div(self.kv_len, self.block_kv)

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: None = None,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> BlockGrid:
        """Returns the grid with maps on another device; arguments as in `BlockMask.to`."""
        self._check_target(device, dtype)
        device = self.device if device is None else torch.device(device)
        if device == self.device and not copy:
            return self
        sizes = self.q_len, self.kv_len, self.block_q, self.block_kv
        return BlockGrid(*sizes, causal=self.causal, device=device)

    def reachable(self) -> Tensor:
        """Returns the blocks with a pair that `causal` allows; all blocks without `causal`."""
        sizes = (self.q_len, self.kv_len, self.block_q, self.block_kv)
        return block_lists.reachable_blocks(*sizes, self.causal, self.device)

    def distances(self) -> tuple[Tensor, Tensor]:
        """Returns the smallest and largest `query position - key` per block, int64 `[nQ, nK]`."""
        first_q, last_q = self._query_positions()
        first_k, last_k = self._key_positions()
        return first_q[:, None] - last_k, last_q[:, None] - first_k

    def none(self) -> Tensor:
        """Returns an empty map."""
        return torch.zeros(self.shape, dtype=torch.bool, device=self.device)

    @plain_ints
    def sink(self, n: int) -> Tensor:
        """Returns the blocks of the first n keys, for all queries."""
        return self.keys(0, check_int("n", n))

    @plain_ints
    def local(self, n: int) -> Tensor:
        """Returns the blocks of keys less than n from a query.

        These are its own key, the n - 1 before it and, if not causal, the n - 1 after it.
        `local((b - 1) * block + 1)` is the band of b blocks, including the diagonal.
        """
        check_int("n", n)
        if n == 0:
            return self.none()
        # The block's smallest distance is below n, and its largest reaches the other end.
        first_q, last_q = self._query_positions()
        first_k, last_k = self._key_positions()
        blocks = last_k > first_q[:, None] - n
        return blocks.logical_and_(first_k <= last_q[:, None] - (0 if self.causal else 1 - n))

    def diagonal(self) -> Tensor:
        """Returns the blocks with the key at a query's own position."""
        return self.local(1)

    @plain_ints
    def keys(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Returns the blocks of the keys `start:stop`, bounds as in a slice, for all queries."""
        start, stop = _bounds(start, stop, self.kv_len)
        first, last = self._key_positions()
        columns = (first < stop) & (last >= start) & (start < stop)
        return columns.expand(self.shape).clone()

    @plain_ints
    def queries(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Returns all keys for the queries `start:stop`, bounds as in a slice."""
        start, stop = _bounds(start, stop, self.q_len)
        first, last = self._query_positions()
        shift = self.kv_len - self.q_len
        rows = (first < stop + shift) & (last >= start + shift) & (start < stop)
        return rows[:, None].expand(self.shape).clone()

    @plain_ints
    def last_queries(self, n: int) -> Tensor:
        """Returns all keys for the last n queries."""
        return self.queries(max(self.q_len - check_int("n", n), 0), self.q_len)

    @plain_ints
    def tokens(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Returns the blocks of global tokens: all queries see them, and they see all keys.

        An example is the text tokens of a video model.

        Args:
            start, stop: key positions, as in a slice; `tokens(-n)` are the last n.
        """
        start, stop = _bounds(start, stop, self.kv_len)
        shift = self.kv_len - self.q_len
        rows = self.queries(max(start - shift, 0), max(stop - shift, 0))
        return rows.logical_or_(self.keys(start, stop))

    @plain_ints
    def mask(self, blocks: Tensor, width: int | None = None) -> BlockMask:
        """`BlockMask.from_blocks` for bool `[nQ, nK]`, `[H|1, nQ, nK]` or `[B|1, H|1, nQ, nK]`."""
        if isinstance(blocks, Tensor) and 2 <= blocks.dim() < 4:
            blocks = blocks[(None,) * (4 - blocks.dim())]
        return BlockMask.from_blocks(
            blocks,
            self.q_len,
            self.kv_len,
            self.block_q,
            self.block_kv,
            causal=self.causal,
            width=width,
        )

    def _check_fields(self) -> None:
        sizes = self.q_len, self.kv_len, self.block_q, self.block_kv
        block_checks.check_sizes(*sizes, self.causal)
        if not isinstance(self.device, torch.device):
            raise TypeError(f"device must be a torch.device, got {self.device!r}")

    def _query_positions(self) -> tuple[Tensor, Tensor]:
        first, last = _ends(self.q_len, self.block_q, self.device)
        shift = self.kv_len - self.q_len
        return first + shift, last + shift

    def _key_positions(self) -> tuple[Tensor, Tensor]:
        return _ends(self.kv_len, self.block_kv, self.device)


tensor_fields.register(BlockGrid, "sparse_fmha.BlockGrid")


def _ends(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the first and last token of each block."""
    first = torch.arange(ceil_div(length, block), device=device) * block
    return first, (first + block).clamp(max=length) - 1


def _bounds(start: int | None, stop: int | None, length: int) -> tuple[int, int]:
    """Like `slice(start, stop).indices(length)`, which torch.compile before 2.13 cannot trace."""
    any_int = -(1 << 62)
    start = 0 if start is None else check_int("start", start, any_int)
    stop = length if stop is None else check_int("stop", stop, any_int)
    start, stop = (x + length if x < 0 else x for x in (start, stop))
    return min(max(start, 0), length), min(max(stop, 0), length)
