"""HiP attention for decoding: the tree search over a cache, repeated every few steps."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_floats, check_int, check_integers, check_shape, plain_ints
from sparse_fmha._ops import hip_search
from sparse_fmha.masks.block_lists import ABSENT
from sparse_fmha.patterns.hip_search import check_keys, halvings


class HipSearch:
    """The keys that HiP finds in the caches of a batch, searched for every `refresh` steps.

    The newest token of a request sees the first keys, a local window, and what the search of `hip`
    finds between, with the query heads of a KV head as its queries:

        divide the keys between into n = keys / granule chunks of equal length;
        until all have at most `granule` keys: halve each chunk with more, and keep the n halves
        with the largest max over the query heads h of q_h . (key in the middle of the half).

    Source: Lee et al. 2024, arXiv:2406.09827, which searches for each query head; here heads that
    share keys share a list. With `refresh` above 1 a search serves that many tokens, as its "mask
    refresh interval" does. The paper leaves open what becomes of keys that leave the window until
    the next search: here the window keeps them.

        found = patterns.HipSearch(batch, heads_kv, refresh=8)
        for each new token:
            tokens = found.step(q, k_cache, seq_lens)
            out = decode_attention(q, k_cache, v_cache, seq_lens, tokens=tokens)

    Nothing waits for the device. `step` counts on the host, so a CUDA graph holds either kind of
    step: capture `search` and `tokens`, or `tokens` alone.

    Args:
        batch, heads_kv: requests, and KV heads of the cache.
        keys: keys found by the search, a multiple of `granule`.
        granule: keys of the smallest chunks, at least 1; 2 to 8 as published.
        local: newest keys that are always seen, at least 1.
        first: first keys that are always seen, besides `keys`.
        refresh: steps from one search to the next, at least 1.
        device: of the caches.

    Raises:
        ValueError, TypeError: a number is not allowed.
    """

    @plain_ints
    def __init__(
        self,
        batch: int,
        heads_kv: int,
        *,
        keys: int = 512,
        granule: int = 2,
        local: int = 128,
        first: int = 4,
        refresh: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.chunks, self.granule = check_keys(keys, granule), granule
        self.local, self.first = check_int("local", local, 1), check_int("first", first)
        self.refresh = check_int("refresh", refresh, 1)
        shape = check_int("batch", batch, 1), check_int("heads_kv", heads_kv, 1)
        # The first keys and those found.
        self._found = torch.full((*shape, first + keys), ABSENT, dtype=torch.int32, device=device)
        self._begin = torch.zeros(batch, 1, dtype=torch.int32, device=device)  # of the window
        self._steps = 0

    def restart(self) -> None:
        """Lets the next `step` search: where a place of the batch gets another request."""
        self._steps = 0

    def step(
        self, q: Tensor, k_cache: Tensor, seq_lens: Tensor, page_table: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Returns `tokens` for the new token of each request, after a search if it is time for one.

        Arguments and errors as in `search`.
        """
        if self._steps % self.refresh == 0:
            self.search(q, k_cache, seq_lens, page_table)
        else:
            self._check(q, k_cache, seq_lens, page_table)
        self._steps += 1
        return self.tokens(seq_lens)

    @torch.no_grad()
    def search(
        self, q: Tensor, k_cache: Tensor, seq_lens: Tensor, page_table: Tensor | None = None
    ) -> None:
        """Searches the keys of each request before its window.

        It reads `2 * keys / granule` keys for each halving and KV head. How often chunks are halved
        follows from how many keys a request can have, not from how many it has.

        Args:
            q: `[batch, 1, Hq, D]`, the new token's, Hq a multiple of the KV heads.
            k_cache: `[batch, rows, Hkv, D]`, or with `page_table` `[pages, page, Hkv, D]`. Rows
                that hold no key of a request do not count.
            seq_lens: int `[batch]`, with the new token; 0 for a request that is padding.
            page_table: int `[batch, n]` or `[batch, Hkv, n]`, as in `decode_attention`. Chunks
                whose middle is on a page that it does not have are not kept.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not match.
            RuntimeError: the head dim is not a multiple of 8 up to 256, or, on CUDA, the dtype is
                fp64 or `keys / granule` is above 4096.
        """
        table = self._check(q, k_cache, seq_lens, page_table)
        heads, rows = k_cache.shape[2], k_cache.shape[1]
        most = rows if table is None else table.shape[2] * rows
        begin = seq_lens.int().clamp(self.local, max(self.local, most)) - self.local
        self._begin.copy_(begin[:, None])
        # The heads that share keys are the queries of one search.
        queries = q[:, 0].unflatten(1, (heads, -1)).transpose(1, 2)
        found, _ = hip_search.search(
            queries,
            k_cache,
            self._begin,
            None if table is None else table.int(),
            block_q=queries.shape[1],
            sample=1,
            chunks=self.chunks,
            granule=self.granule,
            first=self.first,
            halvings=halvings(max(0, most - self.local), self.chunks, self.granule),
        )
        self._found.copy_(found[:, :, 0])

    def tokens(self, seq_lens: Tensor) -> tuple[Tensor, None]:
        """Returns the keys that the newest token of each request sees: `tokens` of
        `decode_attention`.

        Args:
            seq_lens: int `[batch]`, with the new token. Counted from the last search it must have
                grown by less than `refresh`; otherwise keys that have left the window are missing.

        Returns:
            indices int32 `[batch, 1, Hkv, first + keys + local + refresh - 1]`, each key once and
            -1 where there is none, and None.
        """
        heads, device = self._found.shape[1], self._found.device
        near = torch.arange(1 - self.local - self.refresh, 0, dtype=torch.int32, device=device)
        near = seq_lens.int()[:, None] + near
        near = near.masked_fill(near < self._begin, ABSENT)[:, None]
        return torch.cat([self._found, near.expand(-1, heads, -1)], -1)[:, None], None

    def _check(
        self, q: Tensor, k_cache: Tensor, seq_lens: Tensor, page_table: Tensor | None
    ) -> Tensor | None:
        """Checks the arguments; returns the page table as `[batch, Hkv or 1, n]`."""
        batch, heads = self._found.shape[:2]
        check_floats("q", q, 4, "[batch, 1, heads, head dim]")
        check_floats("k_cache", k_cache, 4, "[batch or pages, rows, KV heads, head dim]")
        if q.shape[:2] != (batch, 1) or not q.shape[2] or q.shape[2] % heads:
            raise ValueError(
                f"q must have shape [{batch}, 1, a multiple of {heads}, head dim], got "
                f"{list(q.shape)}"
            )
        if k_cache.shape[2:] != (heads, q.shape[3]):
            raise ValueError(
                f"k_cache must have {heads} KV heads and q's head dim, {q.shape[3]}, got shape "
                f"{list(k_cache.shape)}"
            )
        if k_cache.dtype != q.dtype:
            raise TypeError(f"k_cache must have q's dtype, {q.dtype}, got {k_cache.dtype}")
        check_integers("seq_lens", seq_lens)
        check_shape("seq_lens", seq_lens, (batch,))
        named = {"q": q, "k_cache": k_cache, "seq_lens": seq_lens, "page_table": page_table}
        for name, tensor in named.items():
            if tensor is not None and tensor.device != self._found.device:
                raise ValueError(
                    f"{name} must be on the device of the search, {self._found.device}, got "
                    f"{tensor.device}"
                )
        if page_table is None:
            if k_cache.shape[0] != batch:
                raise ValueError(
                    f"k_cache must have {batch} requests without a page_table, got "
                    f"{k_cache.shape[0]}"
                )
            return None
        check_integers("page_table", page_table)
        shape = page_table.shape
        if shape[:-1] not in ((batch,), (batch, heads)) or not shape[-1]:
            raise ValueError(
                f"page_table must have shape [{batch}, n] or [{batch}, {heads}, n], n at least 1, "
                f"got {list(shape)}"
            )
        return (
            page_table.view(batch, -1, shape[-1]) if page_table.dim() == 3 else page_table[:, None]
        )
