"""Masks on GPUs: moved, pinned, as inputs of graphs; tests/masks has the rest."""

import pytest
import torch
from op_calls import op_calls
from torch.utils.data import DataLoader

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask

pytestmark = pytest.mark.gpu

LENGTH = 200


def block_mask(given):
    lists = {name: given[name] for name in given if name.startswith("partial_")}
    return BlockMask(given["counts"], given["indices"], LENGTH, LENGTH, 64, 64, **lists)


def stripe_mask(given):
    ranges = given["range_starts"], given["range_counts"]
    return StripeMask(given["columns"], given["counts"], LENGTH, LENGTH, 64, *ranges)


KINDS = {
    "block_sparse": (block_mask, sparse_fmha.block_sparse_attention),
    "stripe": (stripe_mask, sparse_fmha.stripe_attention),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def made(cuda):
    """made(kind): q, k, v on the GPU, the mask on the CPU, and what attention gives."""
    calls = op_calls(cuda, torch.bfloat16)

    def make(kind):
        call = calls[f"{kind}_fwd"]
        mask_of, _ = KINDS[kind]
        qkv = [call.arguments[name] for name in "qkv"]
        mask = mask_of({n: t.cpu() for n, t in call.tensors().items() if n not in "qkv"})
        return qkv, mask, call()[0]

    return make


@kinds
def test_a_moved_mask_gives_the_same(made, cuda, kind):
    qkv, mask, expected = made(kind)
    attend = KINDS[kind][1]
    there = mask.to(cuda, non_blocking=True)
    assert attend(*qkv, there).equal(expected)
    assert there.to("cuda:0") is there
    with pytest.raises(ValueError, match=r"must be on .* device"):
        attend(*qkv, mask)


@kinds
def test_pinned_memory(made, cuda, kind):
    qkv, mask, expected = made(kind)
    pinned = mask.pin_memory()
    assert pinned.counts.is_pinned()
    (loaded,) = DataLoader([mask], batch_size=None, pin_memory=True)
    assert loaded.counts.is_pinned()
    for one in (pinned, loaded):
        assert KINDS[kind][1](*qkv, one.to(cuda, non_blocking=True)).equal(expected)


@kinds
def test_device_hooks(made, cuda, kind):
    accelerate = pytest.importorskip("accelerate")
    qkv, mask, expected = made(kind)
    moved = accelerate.utils.send_to_device({"mask": mask}, cuda)["mask"]
    assert KINDS[kind][1](*qkv, moved).equal(expected)


@kinds
def test_a_second_device(made, kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    qkv, mask, expected = made(kind)
    there = [x.to("cuda:1") for x in (*qkv, mask.to("cuda:0"))]
    assert KINDS[kind][1](*there).cpu().equal(expected.cpu())
    assert torch.cuda.current_device() == 0


@kinds
def test_an_exported_program(made, cuda, kind):
    qkv, mask, expected = made(kind)
    attend = KINDS[kind][1]

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return attend(q, k, v, mask)

    given = (*qkv, mask.to(cuda))
    assert torch.export.export(Attention(), given).module()(*given).equal(expected)
