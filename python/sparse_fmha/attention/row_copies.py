"""Copies of listed rows of each head, out of tensors and back."""

from __future__ import annotations

import torch
from torch import Tensor


def row_index(rows: Tensor, absent: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns which row of `[B * length * H, D]` each entry is, int64, in the order `[B, n, H]`.

    Args:
        rows: int64 `[B, H, n]`, from 0 to length - 1 where not `absent`, bool `[B, H, n]`.

    Returns:
        To read from, where an absent row is the first of its head; and to write to, where it is
        `B * length * H`.
    """
    batch, heads, _ = rows.shape
    entry = torch.arange(batch, device=rows.device)[:, None, None] * (length * heads)
    first = entry + torch.arange(heads, device=rows.device)
    rows, absent = rows.transpose(1, 2), absent.transpose(1, 2)
    index = torch.add(first, rows.masked_fill(absent, 0), alpha=heads)
    return index.flatten(), index.masked_fill(absent, batch * length * heads).flatten()


def take_indexed(x: Tensor, index: Tensor) -> Tensor:
    """Returns rows `[B, n, H, D]` of x `[B, L, H, D]`, by an index of `row_index` to read from."""
    batch, _, heads, dim = x.shape
    n = index.numel() // max(1, batch * heads)
    if not x.numel():
        return x.new_zeros(batch, n, heads, dim)
    return x.reshape(-1, dim).index_select(0, index).view(batch, n, heads, dim)


def put_indexed(x: Tensor, index: Tensor, length: int, empty: float) -> Tensor:
    """The inverse of `take_indexed`, by an index to write to: `[B, length, H, D]`, x at its rows
    and `empty` elsewhere."""
    batch, _, heads, dim = x.shape
    return _put(x, index, x.new_full((batch * length * heads + 1, dim), empty), length)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Returns rows of each head, `[B, n, H, D]`: whole ones, where `gather` takes single elements.

    Args:
        x: `[B, L, Hx, D]`, L at least 1. rows: int64 `[B, H, n]`, from 0 to L - 1; H is a multiple
            of Hx, whose heads serve as many of them each.
    """
    return _select(x, _numbers(rows, x.shape[1], x.shape[2]).transpose(1, 2))


def take_rows_by_head(x: Tensor, rows: Tensor) -> Tensor:
    """`take_rows`, but `[B, H, n, D]`."""
    return _select(x, _numbers(rows, x.shape[1], x.shape[2]))


def put_rows(x: Tensor, rows: Tensor, length: int, empty: float) -> Tensor:
    """The inverse of `take_rows`: `[B, length, H, D]` with x `[B, n, H, D]` at rows, else `empty`.

    Args:
        rows: int64 `[B, H, n]`; those that are not from 0 to length - 1 are left out.
    """
    return put_indexed(x, _to_write(rows, length), length, empty)


def replace_rows(out: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Returns `out` `[B, L, H, D]` with x `[B, n, H, D]` at rows, as in `put_rows`."""
    length = out.shape[1]
    flat = out.reshape(-1, out.shape[3])
    flat = torch.cat([flat, flat.new_zeros(1, out.shape[3])])
    return _put(x, _to_write(rows, length), flat, length)


def _to_write(rows: Tensor, length: int) -> Tensor:
    return row_index(rows, (rows < 0) | (rows >= length), length)[1]


def _numbers(rows: Tensor, length: int, heads: int) -> Tensor:
    """Returns which row of `[B * length * heads, D]` each entry of rows, `[B, H, n]`, is."""
    batch, users, _ = rows.shape
    entry = torch.arange(batch, device=rows.device)[:, None, None] * length
    head = torch.arange(users, device=rows.device) // max(1, users // max(1, heads))
    return (entry + rows) * heads + head[:, None]


def _select(x: Tensor, numbers: Tensor) -> Tensor:
    taken = x.reshape(-1, x.shape[3]).index_select(0, numbers.flatten())
    return taken.view(*numbers.shape, x.shape[3])


def _put(x: Tensor, index: Tensor, flat: Tensor, length: int) -> Tensor:
    """Writes rows to `flat`, `[B * L * H + 1, D]`; the last one takes those that are absent."""
    batch, _, heads, dim = x.shape
    flat.index_copy_(0, index, x.reshape(-1, dim))
    return flat[:-1].view(batch, length, heads, dim)
