"""Decode attention by its definition, key by key.

It shares nothing with the kernels: the keys of a head are a list of positions, in which what is out
of range has no place, and a query is asked for each of them.
"""

import math
from dataclasses import dataclass

import torch
from bias_oracle import capped

TILE = 64
GROUP = 64
DEFAULT_SPLIT = 1024  # of the CPU


@dataclass
class Expected:
    out: torch.Tensor
    lse: torch.Tensor
    visited: torch.Tensor
    skipped: torch.Tensor


def shared(table, *at):
    """An entry of a tensor whose axes of size 1 are shared."""
    return table[tuple(0 if n == 1 else i for i, n in zip(at, table.shape, strict=False))]


@dataclass
class Request:
    """The keys of one KV head of one request."""

    call: dict  # the arguments of decode_attention
    batch: int
    head: int

    def __post_init__(self):
        k, table = self.call["k_cache"], self.call.get("page_table")
        self.len_q = self.call["q"].shape[1]
        rows = k.shape[1] if table is None else k.shape[1] * table.shape[-1]
        length = min(max(int(self.of_head("seq_lens")), 0), rows)
        self.begin, self.end = 0, length
        if self.call.get("head_starts") is not None:
            start = int(self.of_head("head_starts"))
            end = start + int(self.of_head("head_lengths"))
            self.begin = min(max(start, 0), length)
            self.end = max(min(end, length), self.begin)

    def of_head(self, name):
        tensor = self.call[name]
        return tensor[self.batch] if tensor.dim() == 1 else tensor[self.batch, self.head]

    def row(self, position):
        """(first index, second index) of a position's row in the caches; None if it has none."""
        table = self.call.get("page_table")
        if table is None:
            return self.batch, position
        pages, page = self.call["k_cache"].shape[:2]
        entries = table[self.batch] if table.dim() == 2 else table[self.batch, self.head]
        entry = int(entries[position // page])
        return (entry, position % page) if 0 <= entry < pages else None

    def slots(self, query):
        """The positions in the order of the list, None where there is none."""
        blocks, tokens = self.call.get("blocks"), self.call.get("tokens")
        if blocks is not None:
            indices, counts, block = blocks
            listed = shared(indices, self.batch, self.head).tolist()
            count = min(max(int(shared(counts, self.batch, self.head)), 0), len(listed))
            found = [b * block + i for b in listed[:count] for i in range(block)]
        elif tokens is not None:
            indices, counts = tokens
            found = shared(indices, self.batch, query, self.head).tolist()
            if counts is not None:
                count = int(shared(counts, self.batch, query, self.head))
                found = found[: min(max(count, 0), len(found))]
        else:
            found = list(range(self.begin, self.end))
        inside = [self.begin <= p < self.end and self.row(p) is not None for p in found]
        return [p if ok else None for p, ok in zip(found, inside, strict=True)]

    def sees(self, query, position):
        own = self.end - self.len_q + query
        tree, window = self.call.get("tree_mask"), self.call.get("window")
        new = position - (self.end - self.len_q)
        if tree is not None:
            word = int(tree[self.batch, query, new // 32]) if new >= 0 else -1
            return new < 0 or bool(word >> (new % 32) & 1)
        if self.call.get("causal", True) and position > own:
            return False
        return window is None or position > own - window


def expected(call, dtype=torch.float64):
    """The results of decode_attention(**call), computed in `dtype`."""
    q, k = call["q"], call["k_cache"]
    batch, _, heads_q = q.shape[:3]
    heads = k.shape[2]
    out = torch.zeros(q.shape, dtype=dtype)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    tiles = torch.zeros(2, batch, heads, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            request = Request(call, b, h)
            for rows in groups_of_rows(call, heads_q // heads):
                tiles[:, b, h] += attend(call, request, rows, dtype, out, lse)
    if call.get("sink") is not None:
        sink = call["sink"].double()
        total = torch.logaddexp(lse, sink)
        out *= torch.where(lse == -torch.inf, 0, (lse - total).exp())[..., None].to(dtype)
        lse = total
    return Expected(out, lse, *tiles)


def tanh_error(call):
    """Of a capped score on a GPU: the cap is the most, and scores of drawn calls are below 100."""
    return 2**-11 * min(call.get("softcap", 0), 100)


def assert_as_good_as_eager(call, out, lse, lse_error):
    """The error of out is at most twice that of the definition in the call's dtype, plus rounding.

    Args:
        lse_error: allowed beside a relative error of 2e-6.
    """
    __tracebackhide__ = True
    exact, eager = expected(call), expected(call, call["q"].dtype)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=2e-6, atol=lse_error)
    assert out.isfinite().all()
    assert out[exact.lse == -torch.inf].eq(0).all()
    allowed = 2 * (eager.out.double() - exact.out).abs().max()
    allowed += 4 * torch.finfo(out.dtype).eps * exact.out.abs().max()
    error = (out.double() - exact.out).abs().max()
    assert error <= allowed, (error, allowed)


def groups_of_rows(call, group):
    """Lists of (query, head of the group) that are computed together."""
    rows = [(i, g) for i in range(call["q"].shape[1]) for g in range(group)]
    lists = [rows]
    tokens = call.get("tokens")
    if tokens is not None and any(t is not None and t.shape[1] > 1 for t in tokens):
        lists = [rows[i : i + group] for i in range(0, len(rows), group)]
    return [part[i : i + GROUP] for part in lists for i in range(0, len(part), GROUP)]


def attend(call, request, rows, dtype, out, lse):
    q, k, v = (call[name] for name in ("q", "k_cache", "v_cache"))
    b, h = request.batch, request.head
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if call.get("scale") is None else call["scale"]
    threshold = call.get("skip_threshold", 0.0)
    threshold = float(threshold[b] if isinstance(threshold, torch.Tensor) else threshold)
    limit = math.log(threshold) if threshold > 0 else -math.inf
    slots = request.slots(rows[0][0])
    split = call.get("split_tokens") or DEFAULT_SPLIT
    seen = {i: [p is not None and request.sees(i, p) for p in slots] for i, _ in rows}
    places = [(s, *request.row(p)) for s, p in enumerate(slots) if p is not None]
    if not places:
        return torch.zeros(2, dtype=torch.int64)
    at, outer, inner = torch.tensor(places).T
    visible = torch.tensor([seen[i] for i, _ in rows])
    own = b, [i for i, _ in rows], [h * group + g for _, g in rows]
    queries = q[own].to(dtype)
    scores = torch.full(visible.shape, -torch.inf, dtype=dtype)
    products = scale * (queries @ k[outer, inner, h].to(dtype).T)
    scores[:, at] = capped(products, call.get("softcap", 0))
    scores.masked_fill_(~visible, -torch.inf)  # the row may hold NaN
    visited = skipped = 0
    for first in range(0, len(slots), split):
        most = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        for begin in range(first, min(first + split, len(slots)), TILE):
            tile = scores[:, begin : min(begin + TILE, first + split)]
            tops = tile.double().amax(1)
            votes = tops > -torch.inf
            visited += int(votes.any())
            if votes.any() and (tops - most)[votes].lt(limit).all():
                skipped += 1
                tile.fill_(-torch.inf)
            else:
                most = torch.maximum(most, tops)
    lse[own] = scores.double().logsumexp(1)
    values = torch.zeros(len(slots), q.shape[3], dtype=dtype)
    values[at] = v[outer, inner, h].to(dtype).nan_to_num()
    some = scores.amax(1) > -torch.inf
    weights = scores.softmax(1).masked_fill(~some[:, None], 0)
    out[own] = weights @ values
    return torch.tensor([visited, skipped])


def seen_rows(call):
    """For each KV head, the rows (first index, second index) that some query sees."""
    batch, len_q = call["q"].shape[:2]
    rows = set()
    for b in range(batch):
        for h in range(call["k_cache"].shape[2]):
            request = Request(call, b, h)
            for i in range(len_q):
                listed = {p for p in request.slots(i) if p is not None}
                rows |= {(*request.row(p), h) for p in listed if request.sees(i, p)}
    return rows
