"""One small call of every raw op, with all of its tensor arguments, on any device."""

from dataclasses import dataclass

import torch

from sparse_fmha import BlockMask, StripeMask

OPS = torch.ops.sparse_fmha
LENGTH, DIM = 200, 32


@dataclass(frozen=True)
class Call:
    op: object
    arguments: dict

    def __call__(self, **changes):
        """The results as a tuple."""
        result = self.op(**{**self.arguments, **changes})
        return result if isinstance(result, tuple) else (result,)

    def same(self, **changes):
        """Asserts that the arguments given make no difference, to the bit."""
        __tracebackhide__ = True
        for got, expected in zip(self(**changes), self(), strict=True):
            assert got.equal(expected)

    def same_or_refused(self, name, tensor):
        """The same, or an error that names the argument; returns whether it was one."""
        __tracebackhide__ = True
        try:
            self(**{name: tensor})
        except RuntimeError as error:
            assert f"sparse_fmha: {name} " in str(error)  # noqa: PT017
            return True
        self.same(**{name: tensor})
        return False

    def tensors(self):
        return {n: a for n, a in self.arguments.items() if isinstance(a, torch.Tensor)}


def _values(*shape, seed, device, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _qkv(device, dtype, *grid):
    heads = {"q": 4, "k": 2, "v": 2}
    return {
        name: _values(2, *grid, n, DIM, seed=seed, device=device, dtype=dtype)
        for seed, (name, n) in enumerate(heads.items())
    }


def _block_lists(device):
    """Full and partial blocks of 64 x 64, other lists for each head."""
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(1, 4, LENGTH, LENGTH, generator=generator) < 0.5
    visible[..., 64:128] = True  # a column of full blocks
    mask = BlockMask.from_dense(visible.to(device), 64, 64)
    return {
        "counts": mask.counts,
        "indices": mask.indices,
        "partial_counts": mask.partial_counts,
        "partial_indices": mask.partial_indices,
        "partial_bits": mask.partial_bits,
        "block_q": 64,
        "block_kv": 64,
    }


def _stripe_lists(device):
    generator = torch.Generator().manual_seed(4)
    seen = torch.rand(1, 4, 2, LENGTH, generator=generator) < 0.2
    seen[..., 20:84] = False  # where the run is
    mask = StripeMask.from_columns(seen.to(device), LENGTH, 128)
    return {
        "columns": mask.columns,
        "counts": mask.counts,
        "range_starts": torch.full((1, 4, 2, 1), 20, dtype=torch.int32, device=device),
        "range_counts": torch.ones(1, 4, 2, dtype=torch.int32, device=device),
        "block_q": 128,
    }


def op_calls(device="cpu", dtype=torch.float32):
    """The calls by the name of their op."""
    line, grid = _qkv(device, dtype, LENGTH), _qkv(device, dtype, 13, 14)
    extra = {
        name: _values(2, 5, 2, DIM, seed=seed, device=device, dtype=dtype)
        for seed, name in ((5, "extra_k"), (6, "extra_v"))
    }
    window = {"window": [5, 6], "stride": [1, 2], "dilation": [2, 1], "causal": [0, 1]}
    mechanisms = {
        "fmha": {**line, "causal": True},
        "neighborhood": {**grid, **window, **extra},
        "block_sparse": {**line, **_block_lists(device)},
        "stripe": {**line, **_stripe_lists(device)},
    }
    calls = {}
    for name, arguments in mechanisms.items():
        threshold = torch.full((2,), 0.05, device=device)
        calls[f"{name}_fwd"] = arguments
        calls[f"{name}_skip_fwd"] = {**arguments, "skip_threshold": threshold}
    blocks = {"block": 64, "step": 1}
    long = _qkv(device, dtype, 400)
    q_mean = long["q"].float().unflatten(1, (-1, 50)).mean(2).transpose(1, 2)[:, :, :7].contiguous()
    least = torch.full(q_mean.shape[:3], 0.1, device=device)
    keys = {"q_mean": q_mean, "k": long["k"], "least": least, **blocks}
    calls["anchor_means"] = {"q": long["q"], "k": long["k"], "scale": 0.2, **blocks}
    calls["anchor_keys"] = keys
    bits = _values(2, 4, 7, 9, seed=8, device=device, dtype=torch.float64).mul(2**30).int()
    calls["anchor_columns"] = {"bits": bits, "first": 64, "width": 150}
    return {name: Call(getattr(OPS, name), arguments) for name, arguments in calls.items()}
