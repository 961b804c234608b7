"""Calls of decode_attention, drawn from a seed: caches hold NaN wherever no query looks."""

import itertools
import random

import decode_oracle
import torch

FORMS = ("all", "blocks", "tokens", "tokens by query", "spans")
LAYOUTS = ("heads last", "heads first", "halves")
# Of pages, splits, new tokens, heads and lengths (ragged and equal): all combinations.
PAGES = (None, 1, 16, 64)
SPLITS, QUERIES = (None, 64, 128), (1, 2, 5, 16)
HEADS = ((1, 1), (3, 1), (4, 2), (16, 1))
LENGTHS = ((0, 1, 190), (200, 200, 200))
BAD = (-1, -(2**31), 2**31 - 1, 10**6)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def cache_of(layout, outer, rows, heads, dim, dtype):
    """Two caches that hold NaN."""
    if layout == "heads first":
        shape = (outer, heads, rows, dim)
        return [torch.full(shape, torch.nan, dtype=dtype).transpose(1, 2) for _ in "kv"]
    if layout == "halves":
        return torch.full((outer, 2, rows, heads, dim), torch.nan, dtype=dtype).unbind(1)
    return [torch.full((outer, rows, heads, dim), torch.nan, dtype=dtype) for _ in "kv"]


def draw(
    seed,
    form="all",
    page=None,
    len_q=1,
    heads=(4, 2),
    dim=16,
    dtype=torch.float32,
    layout="heads last",
    rows=200,
    batch=4,
    by_head=False,
    bad=True,
    lengths=None,
    **options,
):
    """The arguments of one call.

    Args:
        page: rows of a page; None: a contiguous cache.
        by_head: seq_lens and page_table for each KV head.
        bad: lengths, tables and lists hold entries out of range, too.
        lengths: seq_lens; drawn if not given.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    heads_q, heads_kv = heads
    call = {"form": form, **options}
    if page is None:
        outer, capacity = batch, rows
        call["k_cache"], call["v_cache"] = cache_of(layout, batch, rows, heads_kv, dim, dtype)
    else:
        width = -(-rows // page)
        owners = batch * heads_kv if by_head else batch
        outer, capacity = owners * width + 3, width * page
        call["k_cache"], call["v_cache"] = cache_of(layout, outer, page, heads_kv, dim, dtype)
        order = torch.randperm(outer, generator=generator)[: owners * width]
        shape = (batch, heads_kv, width) if by_head else (batch, width)
        table = order.reshape(shape).to(torch.int32)
        if bad:
            table[0, ..., rng.randrange(width)] = rng.choice([*BAD, outer])
        # A part of a wider table, as servers have it.
        call["page_table"] = torch.cat((table, table), -1)[..., :width]
    unit = page or 64
    likely = [0, 1, unit - 1, unit, unit + 1, capacity, capacity - 1, len_q, len_q - 1]
    likely += [rng.randrange(capacity + 1) for _ in range(6)]
    likely = [min(n, capacity) for n in likely] + ([capacity + 50, -3] if bad else [])
    count = batch * heads_kv if by_head else batch
    drawn = int32(lengths or [rng.choice(likely) for _ in range(count)])
    call["seq_lens"] = drawn.reshape(batch, heads_kv) if by_head else drawn
    call |= lists_of(rng, form, capacity, batch, len_q, heads_kv, bad)
    call["q"] = torch.randn((batch, len_q, heads_q, dim), generator=generator).to(dtype)
    del call["form"]
    fill(call, generator)
    return call


def product(form, page, **sizes):
    """Calls of one form and page size, of every combination of the others."""
    others = itertools.product(SPLITS, QUERIES, HEADS, LENGTHS)
    for seed, (split, len_q, heads, lengths) in enumerate(others):
        options = {"len_q": len_q, "heads": heads, "lengths": lengths, "split_tokens": split}
        yield draw(seed, form, page, batch=len(lengths), **options, **sizes)


def lists_of(rng, form, capacity, batch, len_q, heads, bad):
    def counts(*shape, most):
        values = [
            rng.choice([0, 1, most, rng.randrange(most + 1)]) for _ in range(shape_size(shape))
        ]
        if bad:
            values[0] = rng.choice([*BAD, most + 1])
        return int32(values).reshape(shape)

    def places(*shape, width, end):
        lists = []
        for _ in range(shape_size(shape)):
            entries = rng.sample(range(end), min(width, end)) + [-1] * max(0, width - end)
            if bad and rng.random() < 0.5:
                entries[rng.randrange(width)] = rng.choice([*BAD, end + 1])
            lists.append(entries)
        return int32(lists).reshape(*shape, width)

    of_heads = rng.choice([1, heads])
    if form == "blocks":
        block = rng.choice([16, 32, 64, 128])
        end = -(-capacity // block)
        width = rng.randint(1, end + 1)
        indices = places(batch, of_heads, width=width, end=end)
        return {"blocks": (indices, counts(batch, of_heads, most=width), block)}
    if form.startswith("tokens"):
        of_queries = len_q if form == "tokens by query" else 1
        width = rng.randint(1, capacity)
        indices = places(batch, of_queries, of_heads, width=width, end=capacity)
        some = counts(batch, of_queries, of_heads, most=width)
        return {"tokens": (indices, rng.choice([None, some]))}
    if form == "spans":
        starts = [rng.choice([0, 1, rng.randrange(capacity)]) for _ in range(batch * heads)]
        lengths = [
            rng.choice([0, 1, 65, rng.randrange(capacity + 1)]) for _ in range(batch * heads)
        ]
        if bad:
            starts[0], lengths[-1] = rng.choice(BAD), rng.choice(BAD)
        return {
            "head_starts": int32(starts).reshape(batch, heads),
            "head_lengths": int32(lengths).reshape(batch, heads),
        }
    return {}


def shape_size(shape):
    return torch.Size(shape).numel()


def loud_tiles(page, **options):
    """Four requests of ten tiles, of which each third one has scores of 40, the others small ones.

    With a threshold of 0.3, which skips the six others, and a split that has them all.
    """
    options |= {"scale": 0.5, "skip_threshold": 0.3, "split_tokens": 640}
    call = draw(2, "all", page, rows=640, lengths=[640] * 4, bad=False, **options)
    call["q"][..., 0] = 1
    call["q"][..., 1:] *= 0.1
    for b in range(4):
        for position in range(640):
            at = b, position
            if page is not None:
                at = int(call["page_table"][b, position // page]), position % page
            call["k_cache"][at][:, 0] = 80.0 * (position // 64 % 3 == 0)
    return call


def clear(call):
    """NaN everywhere in the caches."""
    for name in ("k_cache", "v_cache"):
        call[name].fill_(torch.nan)


def fill(call, generator):
    """Puts keys and values where some query looks."""
    rows = sorted(decode_oracle.seen_rows(call))
    if rows:
        places = tuple(torch.tensor(rows).T)
        for name in ("k_cache", "v_cache"):
            cache = call[name]
            values = torch.randn((len(rows), cache.shape[3]), generator=generator)
            cache[places] = values.to(cache.dtype)


def bits_of_trees(generator, batch, len_q):
    """Trees of drafts: query i sees itself, and what its parent, an earlier query, sees."""
    seen = torch.eye(len_q, dtype=torch.bool).repeat(batch, 1, 1)
    for b in range(batch):
        for i in range(1, len_q):
            parent = int(torch.randint(-1, i, (), generator=generator))
            if parent >= 0:
                seen[b, i] |= seen[b, parent]
    words = torch.nn.functional.pad(seen, (0, -len_q % 32)).unflatten(-1, (-1, 32)).long()
    packed = (words << torch.arange(32)).sum(-1)
    return (packed - (packed >= 2**31).long() * 2**32).to(torch.int32)
