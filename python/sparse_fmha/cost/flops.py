"""FLOPs of the ops, for `torch.utils.flop_counter.FlopCounterMode`.

Two for each multiplication and addition of the matrix products: two products forward, five backward
(three or four if only some gradients are needed), each over the head dim of q or that of v, as
PyTorch counts its own attention. Counted are pairs of a query and a key:

- dense, causal and neighborhood attention: exactly those that are visible, so a causal call counts
  half of what PyTorch's own causal attention counts;
- packed sequences and decode: the visible pairs, if the lengths are on the CPU; elsewhere each
  query counts all keys that the call has room for. Decode over lists counts as lists do;
- lists: all pairs of the listed blocks, columns and ranges, also those that a bitmask or the
  diagonal hides in them. The lists' counts are read if they are on the CPU. Elsewhere reading them
  would wait for the device, and the room of the lists is counted instead: an upper bound.

Skipped tiles count as computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import register_flop_formula

from sparse_fmha._sizes import ceil_div

Given = Mapping[str, Any]  # arguments of an op by name


def register() -> None:
    """Registers the formulas with torch, once per process; the ops must be loaded."""
    ops = {f"{name}_{end}": pairs for name, pairs in PAIRS.items() for end in ("fwd", "bwd")}
    for op, pairs in {**ops, "decode": decode_pairs, "decode_out": decode_pairs}.items():
        for version in (op, f"{op}_symbolic"):
            packet = getattr(torch.ops.sparse_fmha, version)
            register_flop_formula(packet, get_raw=True)(_formula(packet, pairs))


def _formula(packet: Any, pairs: Callable[[Given], int]) -> Callable[..., int]:
    arguments = packet.default._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    names = [a.name for a in arguments]

    def flops(*args: Any, out_val: object = None, **kwargs: Any) -> int:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        return 2 * _columns(given) * pairs(given)

    return flops


def _columns(given: Given) -> int:
    """Head dims of the matrix products over the pairs, summed."""
    dim = int(given["q"].shape[-1])
    values = int((given["v"] if "v" in given else given["v_cache"]).shape[-1])
    if "dout" not in given:
        return dim + values
    need_dq, need_dkv = given["need_dq"], given["need_dkv"]
    found: int = dim + values + need_dq * dim + need_dkv * (dim + values)
    return found if need_dq or need_dkv else 0


def _rows(given: Given) -> int:
    """Batch entries times heads of q."""
    return int(given["q"].shape[0]) * int(given["q"].shape[-2])


def dense_pairs(given: Given) -> int:
    q_len, kv_len = int(given["q"].shape[1]), int(given["k"].shape[1])
    pairs = q_len * kv_len
    if given["causal"]:
        last = min(q_len, kv_len)  # rows that see a key, the last of them all keys
        pairs = last * (kv_len - last) + last * (last + 1) // 2
    return _rows(given) * pairs


def neighborhood_pairs(given: Given) -> int:
    pairs, tokens = 1, 1
    axes = (given[name] for name in ("window", "stride", "dilation", "causal"))
    for length, *axis in zip(given["q"].shape[1:-2], *axes, strict=True):
        pairs *= _axis_pairs(int(length), *map(int, axis))
        tokens *= int(length)
    extra = 0 if given["extra_k"] is None else int(given["extra_k"].shape[1])
    return _rows(given) * (pairs + tokens * extra)


def _axis_pairs(length: int, window: int, stride: int, dilation: int, causal: int) -> int:
    if not causal:
        return length * window  # windows keep their size at borders
    short, longer = divmod(length, dilation)  # residues have `short` tokens, some one more
    pairs = longer * _causal_pairs(short + 1, window, stride)
    return pairs + (dilation - longer) * _causal_pairs(short, window, stride)


def _causal_pairs(length: int, window: int, stride: int) -> int:
    """All keys up to each query, without those before the window of its group's last query."""
    groups, ragged = divmod(length, stride)
    first = min(window // stride, groups)  # group whose window does not begin at 0
    ends = (groups * (groups + 1) - first * (first + 1)) // 2  # sum of g + 1 from it on
    hidden = stride * (stride * ends - window * (groups - first))
    hidden += ragged * max(length - window, 0)
    return length * (length + 1) // 2 - hidden


def block_pairs(given: Given) -> int:
    block_q, block_kv = int(given["block_q"]), int(given["block_kv"])
    q_len, kv_len = int(given["q"].shape[1]), int(given["k"].shape[1])
    ragged = kv_len - (ceil_div(kv_len, block_kv) - 1) * block_kv
    pairs = 0
    for prefix in ("", "partial_"):
        counts, indices = given[f"{prefix}counts"], given[f"{prefix}indices"]
        if counts is None:
            continue
        keys = _listed(counts, indices) * block_kv
        if _readable(indices):
            last = indices == ceil_div(kv_len, block_kv) - 1
            keys = keys - (last & _in_list(counts, indices)).sum(-1) * (block_kv - ragged)
        pairs += _of_groups(keys, given, q_len, block_q)
    return pairs


def stripe_pairs(given: Given) -> int:
    keys = _listed(given["counts"], given["columns"])
    if given["range_counts"] is not None:
        starts = given["range_starts"]
        keys = keys + _listed(given["range_counts"], starts) * int(given["range_size"])
    return _of_groups(keys, given, int(given["q"].shape[1]), int(given["block_q"]))


def packed_pairs(given: Given) -> int:
    """Queries of each sequence and its keys; causal is aligned to its end."""
    tokens, heads = int(given["q"].shape[0]), int(given["q"].shape[-2])
    lengths = given["cu_q"], given["cu_k"], given["seqused_k"]
    if not all(x is None or _readable(x) for x in lengths):
        return tokens * heads * int(given["max_k"])
    cu_q, cu_k, used = lengths
    queries = cu_q.long().diff()
    keys = cu_k.long().diff() if used is None else used.long()
    pairs = queries * keys
    if given["causal"]:
        last = torch.minimum(queries, keys)
        pairs = last * (keys - last) + last * (last + 1) // 2
    return heads * int(pairs.sum())


def decode_pairs(given: Given) -> int:
    """All queries of a request count as its last one, which sees the most keys."""
    q, lengths = given["q"], given["seq_lens"]
    room = int(given["k_cache"].shape[1])
    if given["page_table"] is not None:
        room *= int(given["page_table"].shape[-1])
    keys: Any = lengths.long() if _readable(lengths) else room
    if given["window"] is not None:
        window = int(given["window"])
        keys = keys.clamp(max=window) if isinstance(keys, Tensor) else min(keys, window)
    for name, size in (("block", int(given["block"])), ("token", 1)):
        if given[f"{name}_indices"] is not None:
            keys = _listed(given[f"{name}_counts"], given[f"{name}_indices"]) * size
    if given["head_lengths"] is not None:
        keys = given["head_lengths"].long() if _readable(given["head_lengths"]) else room
    if not isinstance(keys, Tensor):
        return _rows(given) * int(q.shape[1]) * int(keys)
    share = _rows(given) * int(q.shape[1]) / max(keys.numel(), 1)
    return int(share * int(keys.sum()))


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and detect_fake_mode([tensor]) is None


def _in_list(counts: Tensor, entries: Tensor) -> Tensor:
    place = torch.arange(entries.shape[-1], dtype=counts.dtype, device=counts.device)
    return place < counts[..., None]


def _listed(counts: Tensor, entries: Tensor) -> Any:
    """Entries of each list `[B|1, H|1, groups]`, or the room of every list."""
    return counts.long() if _readable(counts) else int(entries.shape[-1])


def _of_groups(keys: Any, given: Given, q_len: int, block_q: int) -> int:
    """Pairs of all batch entries and heads, from the keys of each group of queries."""
    if not isinstance(keys, Tensor):
        return _rows(given) * q_len * int(keys)
    groups = keys.shape[-1]
    sizes = torch.full((groups,), block_q, dtype=torch.long, device="cpu")
    sizes[-1:] -= groups * block_q - q_len
    shared = _rows(given) // max(keys.shape[:-1].numel(), 1)
    return shared * int((keys * sizes).sum())


PAIRS: dict[str, Callable[[Given], int]] = {
    "fmha": dense_pairs,
    "neighborhood": neighborhood_pairs,
    "block_sparse": block_pairs,
    "stripe": stripe_pairs,
    "varlen": packed_pairs,
}
