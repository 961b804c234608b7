"""Enabled models of diffusers in two processes: `python parallel_diffusion.py RANK FOLDER`.

Each rank compares with the whole model, and writes a file of the cases that it passed.
"""

import re
import sys
import traceback
from pathlib import Path

import pytest
import tiny_diffusion
import tiny_diffusion_models
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import context_parallel, tensor_parallel

from sparse_fmha.integrations import diffusers as sparse

WORLD = 2


def make(name, **options):
    found = tiny_diffusion if name in tiny_diffusion.MAKERS else tiny_diffusion_models
    return found.make(name, **options)


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def even(tiny):
    """Images that two ranks cut in halves, which 9 x 11 tokens are not; and no padded text, which
    diffusers' own cross-attention cannot take in context parallelism."""
    if tiny.grid == (9, 11):
        tiny.grid, inputs = (8, 11), tiny.inputs
        inputs["hidden_states"] = inputs["hidden_states"][:, :88]
        if "img_ids" in inputs:
            inputs["img_ids"] = inputs["img_ids"][..., :88, :]
        else:
            inputs["img_shapes"] = [[(1, 8, 11)]] * 2
    if tiny.name.startswith("LTX"):
        masks = [name for name in tiny.inputs if name.endswith("attention_mask")]
        tiny.inputs.update(dict.fromkeys(masks))
    return tiny


def split(model, **options):
    # Helios' plan names each of the trained model's blocks.
    plan = {
        name: value for name, value in model._cp_plan.items()
        if not (number := re.match(r"blocks\.(\d+)", name)) or int(number[1]) < len(model.blocks)
    }  # fmt: skip
    given = ContextParallelConfig(ulysses_degree=WORLD, **options)
    model.enable_parallelism(config=given, cp_plan=plan)


def context(name, first, **options):
    """In both orders of enable and enable_parallelism: sparse steps, a dense one, and disable."""
    tiny = make(name)
    if not options:
        even(tiny)
    dense = tiny(900)
    sparse.enable(tiny.model, "neighborhood", **tiny.options)
    expected = tiny(500)
    sparse.disable(tiny.model)
    if first == "enable":
        sparse.enable(tiny.model, "neighborhood", **tiny.options, first_dense_steps=1)
    split(tiny.model, **options)
    if first != "enable":
        sparse.enable(tiny.model, "neighborhood", **tiny.options, first_dense_steps=1)
    close(tiny(900), dense)
    close(tiny(500), expected)
    sparse.disable(tiny.model)
    close(tiny(900), dense)


def other_methods():
    tiny, found = make("wan"), []
    methods = ("sol", {"tau": 0.5}), ("cube_top_k", {"keep": 0.5}), ("skip", {"threshold": 0.01})
    for method, given in methods:
        sparse.enable(tiny.model, method, **given)
        found.append(tiny())
        sparse.disable(tiny.model)
    split(tiny.model)
    for (method, given), expected in zip(methods, found, strict=True):
        sparse.enable(tiny.model, method, **given)
        close(tiny(), expected)
        sparse.disable(tiny.model)


def gradients():
    tiny = make("wan")
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    weight = tiny.model.blocks[0].attn1.to_v.weight

    def gradient():
        weight.grad = None
        out = tiny.model(**tiny.inputs, return_dict=False)[0]
        out.square().mean().backward()
        return weight.grad

    expected = gradient()
    split(tiny.model)
    part = gradient().clone()
    dist.all_reduce(part)  # each rank has those of its tokens
    size = expected.norm()
    torch.testing.assert_close(part / size, expected / size, rtol=1e-3, atol=1e-3)


def refused():
    tiny = make("wan")
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    tiny.model.enable_parallelism(config=ContextParallelConfig(ring_degree=WORLD))
    with pytest.raises(NotImplementedError, match="as Ulysses alone"):
        tiny()


def tensors():
    """Heads of each rank; the model's plan is diffusers' own."""
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    tiny = make("flux")
    sparse.enable(tiny.model, "neighborhood", **tiny.options)
    expected = tiny()
    tiny.model.enable_parallelism(config=TensorParallelConfig(tp_degree=WORLD))
    heads = tiny.model.transformer_blocks[0].attn.to_q.weight
    close(tiny(), expected)
    assert type(heads).__name__ == "DTensor", type(heads)


CASES = {
    "wan": lambda: context("wan", "enable"),
    "wan, parallel first": lambda: context("wan", "parallel"),
    "ltx": lambda: context("ltx", "enable"),
    "flux": lambda: context("flux", "enable"),
    "flux2": lambda: context("flux2", "parallel"),
    "qwen_image": lambda: context("qwen_image", "enable"),
    "minimax_h3": lambda: context("minimax_h3", "enable"),
    "flux, any length": lambda: context("flux", "enable", ulysses_anything=True),
    "helios": lambda: context("helios", "enable", ulysses_anything=True),
    "methods": other_methods,
    "gradients": gradients,
    "ring": refused,
    "tensors": tensors,
}


def gathered_by_gloo(tensor, dim, group):
    """diffusers' gathering of unequal parts, which gloo needs of one size."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(WORLD)]
    dist.all_gather(sizes, torch.tensor([tensor.shape[dim]]), group=group)
    most = int(max(sizes))
    part = tensor.new_zeros(*tensor.shape[:dim], most, *tensor.shape[dim + 1 :])
    part.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    dist.all_gather(parts, part, group=group)
    return torch.cat([x.narrow(dim, 0, int(n)) for x, n in zip(parts, sizes, strict=True)], dim)


def main(rank, folder):
    torch.set_num_threads(1)
    torch._C._get_accelerator = lambda *_: torch.device("cpu")
    torch.accelerator.device_count = lambda: WORLD
    context_parallel._all_gather_anything = gathered_by_gloo
    sparse.MIN_TOKENS = 0
    store = Path(folder) / "init"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for name, case in CASES.items():
        told = "passed"
        try:
            case()
        except BaseException:
            told = traceback.format_exc()
        (Path(folder) / f"{name} {rank}").write_text(told)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
