"""A small call of each op, for tests of what holds for all of them."""

import torch

OPS = torch.ops.sparse_fmha
INTEGER_OPS = ("anchor_keys", "anchor_columns")  # with integers as results


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def make_calls():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = randn(2, 70, 2, 8), randn(2, 70, 1, 8), randn(2, 70, 1, 8)
    extra_k, extra_v = randn(2, 3, 1, 8), randn(2, 3, 1, 8)
    bits = torch.randint(256, (1, 1, 2, 1, 64, 8), dtype=torch.uint8, generator=generator)
    attended = {
        "fmha": {"causal": True, "scale": 0.3},
        "neighborhood": {
            "window": [9],
            "stride": [2],
            "dilation": [1],
            "causal": [0],
            "scale": None,
            "extra_k": extra_k,
            "extra_v": extra_v,
        },
        "block_sparse": {
            "counts": ints([[[1, 1]]]),
            "indices": ints([[[[0], [1]]]]),
            "partial_counts": ints([[[1, 0]]]),
            "partial_indices": ints([[[[1], [-1]]]]),
            "partial_bits": bits,
            "block_q": 64,
            "block_kv": 64,
        },
        "stripe": {
            "columns": ints([[[[0, 5, 7], [2, 9, -1]]]]),
            "counts": ints([[[3, 2]]]),
            "range_starts": ints([[[[20], [3]]]]),
            "range_counts": ints([[[1, 0]]]),
            "block_q": 64,
        },
    }
    found = {}
    for mechanism, rest in attended.items():
        found[f"{mechanism}_fwd"] = {"q": q, "k": k, "v": v, **rest}
        threshold = torch.tensor([0.1, 0.3])
        skipping = {"q": q, "k": k, "v": v, "skip_threshold": threshold, **rest}
        found[f"{mechanism}_skip_fwd"] = skipping
    long = randn(2, 384, 1, 8)
    found["anchor_means"] = {"q": long, "k": long.flip(0), "block": 64, "step": 1, "scale": 0.3}
    mean, least = randn(2, 2, 6, 8), randn(2, 2, 6)
    found["anchor_keys"] = {"q_mean": mean, "k": long, "least": least, "block": 64, "step": 1}
    bits, _ = OPS.anchor_keys(**found["anchor_keys"])
    found["anchor_columns"] = {"bits": bits, "first": 64, "width": 9}
    return found


# The arguments of each op, by their names, in the order of the schema.
CALLS = make_calls()


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def floats(name):
    """The arguments of an op that a derivative could be taken by."""
    return [key for key, value in CALLS[name].items() if is_float(value)]


def run(name, **changes):
    """All results of the op, as a tuple."""
    results = getattr(OPS, name)(**CALLS[name] | changes)
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)
