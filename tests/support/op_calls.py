"""One small call of every raw op, with all of its tensor arguments, on any device."""

import math
from dataclasses import dataclass

import torch
from layouts import amid, between, with_gaps

from sparse_fmha import BlockMask, StripeMask

OPS = torch.ops.sparse_fmha
SKIPPING = " that skips"  # behind the name of an op, a call with a threshold


def op_name(call):
    return call.removesuffix(SKIPPING)


def op_of(call):
    return getattr(OPS, op_name(call))


def _results(op, arguments, changes):
    result = op(**{**arguments, **changes})
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@dataclass(frozen=True)
class Call:
    op: object
    arguments: dict

    def __call__(self, **changes):
        """The results as a tuple."""
        return _results(self.op, self.arguments, changes)

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

    def same_with_gaps(self, name):
        """The same or refused with a gap behind each entry of any dimension."""
        tensor = self.arguments[name]
        for dim in range(tensor.dim()):
            if tensor.shape[dim] > 1:
                self.same_or_refused(name, with_gaps(tensor, dim))

    def same_expanded(self, name):
        """The same or refused with one entry for all of a dimension: stride 0, but for the last."""
        tensor = self.arguments[name]
        for dim in range(tensor.dim() - 1):
            expanded = tensor.narrow(dim, 0, 1).expand_as(tensor)
            plain = Call(self.op, {**self.arguments, name: expanded.contiguous()})
            plain.same_or_refused(name, expanded)

    def same_amid_others(self):
        """The same with NaN around each operand, and indices far out of range around lists."""
        operands, lists = {}, {}
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point():
                around = between if tensor.dim() < 4 else amid
                operands[name] = around(tensor, float("nan"))
            else:
                lists[name] = between(tensor, torch.iinfo(tensor.dtype).max)
        self.same(**operands)
        self.same(**lists)

    def tensors(self):
        return {n: a for n, a in self.arguments.items() if isinstance(a, torch.Tensor)}


def _values(*shape, seed, device, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _operands(shapes, *like):
    return {
        name: _values(*shape, seed=seed, device=like[0], dtype=like[1])
        for seed, (name, shape) in enumerate(shapes.items())
    }


def _block_lists(length, device):
    """Full and partial blocks of 64 x 64, other lists for each head."""
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(1, 2, length, length, generator=generator) < 0.5
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


def _stripe_lists(length, device):
    """Lists for groups of 64 queries, which differ between heads, and a run for each."""
    generator = torch.Generator().manual_seed(4)
    groups = -(-length // 64)
    seen = torch.rand(1, 2, groups, length, generator=generator) < 0.2
    seen[..., 5:69] = False  # where the run is
    mask = StripeMask.from_columns(seen.to(device), length, 64)
    lists = 1, 2, groups
    return {
        "columns": mask.columns,
        "counts": mask.counts,
        "range_starts": torch.full((*lists, 1), 5, dtype=torch.int32, device=device),
        "range_counts": torch.ones(lists, dtype=torch.int32, device=device),
        "block_q": 64,
    }


def _anchor_calls(device, dtype):
    qk = _operands({"q": (2, 384, 1, 8), "k": (2, 384, 1, 8)}, device, dtype)
    mean = _operands({"q_mean": (2, 2, 6, 8)}, device, torch.float32)
    least = _values(2, 2, 6, seed=7, device=device, dtype=torch.float32)
    bits = torch.randint(2**31 - 1, (2, 4, 7, 9), generator=torch.Generator().manual_seed(8))
    steps = {"block": 64, "step": 1}
    return {
        "anchor_means": {**qk, **steps, "scale": 0.3},
        "anchor_keys": {**mean, "k": qk["k"], "least": least, **steps},
        "anchor_columns": {"bits": bits.to(device, torch.int32), "first": 64, "width": 150},
    }


def _backward_calls(mechanisms):
    calls = {}
    for name, arguments in mechanisms.items():
        out, lse = getattr(OPS, f"{name}_fwd")(**arguments)
        q = arguments["q"]
        dout = _values(*out.shape, seed=11, device=q.device, dtype=q.dtype)
        dlse = _values(*lse.shape, seed=12, device=q.device, dtype=lse.dtype)
        calls[f"{name}_bwd"] = {"dout": dout, "dlse": dlse, **arguments, "out": out, "lse": lse}
    return calls


def _packed(length, device, dtype, dim):
    """Three sequences, of which one is empty, and tokens in none."""
    shapes = {"q": (length, 2, dim), "k": (length + 5, 1, dim), "v": (length + 5, 1, dim)}
    starts = {"cu_q": [2, 30, 30, length - 1], "cu_k": [0, 40, 41, length]}
    cu = {n: torch.tensor(x, dtype=torch.int32, device=device) for n, x in starts.items()}
    used = torch.tensor([33, 1, length], dtype=torch.int32, device=device)
    bounds = {"max_q": length, "max_k": length, "causal": True, "seqused_k": used}
    return {**_operands(shapes, device, dtype), **cu, **bounds}


def op_calls(
    device="cpu",
    dtype=torch.float32,
    length=200,
    grid=(13, 14),
    dim=32,
    backward=False,
    on_cpu_only=False,
):
    """The calls by the name of their op and whether it skips.

    On request also those of backward ops, and of ops that run on the CPU only.
    """
    line, plane = (
        _operands({"q": (2, *axes, 2, dim), "k": (2, *axes, 1, dim), "v": (2, *axes, 1, dim)},
                  device, dtype)
        for axes in ((length,), grid)
    )  # fmt: skip
    window = {"window": [5, 6], "stride": [1, 2], "dilation": [2, 1], "causal": [0, 1]}
    extra = _operands({"extra_k": (2, 3, 1, dim), "extra_v": (2, 3, 1, dim)}, device, dtype)
    bias = _operands({"key_bias": (2, 1, math.prod(grid))}, device, torch.float32)
    mechanisms = {
        "fmha": {**line, "causal": True, "scale": 0.3},
        "neighborhood": {**plane, **window, "scale": None, **extra}
        | (bias if device == "cpu" else {}),
        "block_sparse": {**line, **_block_lists(length, device)},
        "stripe": {**line, **_stripe_lists(length, device)},
    }
    if on_cpu_only:
        mechanisms["varlen"] = _packed(length, device, dtype, dim)
    calls = {}
    for name, arguments in mechanisms.items():
        batch = len(arguments["cu_q"]) - 1 if "cu_q" in arguments else len(arguments["q"])
        threshold = torch.tensor([0.05, 0.2, 0.1][:batch], device=device)
        calls[f"{name}_fwd"] = arguments
        calls[f"{name}_fwd{SKIPPING}"] = arguments | {"skip_threshold": threshold}
    calls |= _anchor_calls(device, dtype)
    if backward:
        calls |= _backward_calls(mechanisms)
    return {name: Call(op_of(name), arguments) for name, arguments in calls.items()}


# Small ones on the CPU: the arguments of each op by their names.
CALLS = {
    name: call.arguments
    for name, call in op_calls(
        length=70, grid=(10, 7), dim=8, backward=True, on_cpu_only=True
    ).items()
}
INTEGER_OPS = ("anchor_keys", "anchor_columns")  # with integers as results


def floats(name):
    """The arguments of an op that a derivative could be taken by."""
    tensors = Call(name, CALLS[name]).tensors()
    return [key for key, value in tensors.items() if value.is_floating_point()]


def run(name, **changes):
    """All results of the op, as a tuple."""
    return _results(op_of(name), CALLS[name], changes)
