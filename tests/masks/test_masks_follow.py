"""Masks, grids, layouts and plans go where tensors go: devices, copies, files, pytrees."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from travellers import KINDS, assert_same, tensors

from sparse_fmha import BlockGrid, BlockMask, SkipStats, StripeMask

kinds = pytest.mark.parametrize("kind", KINDS)
few = settings(max_examples=25)
data = st.data()


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def unflattened(value):
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: saved(value, weights_only=True),
    "to": lambda value: value.to("cpu", copy=True),
    "pytree": unflattened,
    "tree_map": lambda value: pytree.tree_map(torch.clone, value),
    "in a dict": lambda value: saved({"mask": [value]}, weights_only=True)["mask"][0],
}


@kinds
@pytest.mark.parametrize("way", COPIES)
@few
@given(data)
def test_a_copy_is_the_same(kind, way, data):
    value = data.draw(KINDS[kind])
    found = COPIES[way](value)
    assert found is not value
    assert_same(found, value)


@kinds
@few
@given(data)
def test_to_moves_all_tensors(kind, data):
    value = data.draw(KINDS[kind])
    moved = value.to("meta", non_blocking=True)
    assert len(tensors(moved)) == len(tensors(value))
    assert all(tensor.is_meta for tensor in tensors(moved))
    assert not any(tensor.is_meta for tensor in tensors(value))
    assert getattr(moved, "device", torch.device("meta")).type == "meta"
    for same in (value.to("cpu"), value.to(torch.device("cpu")), value.to(), value.to(None)):
        assert same is value


@kinds
@given(data)
@settings(max_examples=5)
def test_a_dtype_is_refused(kind, data):
    value = data.draw(KINDS[kind])
    for args in ((torch.float16,), ("cpu", torch.float16)):
        with pytest.raises(
            TypeError, match=r"dtype must be None, because the dtypes of a .* are fixed, got"
        ):
            value.to(*args)


@kinds
@few
@given(data)
def test_accelerate_moves_it(kind, data):
    operations = pytest.importorskip("accelerate.utils.operations")
    value = data.draw(KINDS[kind])
    inputs = operations.send_to_device({"hidden": torch.ones(2), "mask": [value]}, "meta")
    assert all(tensor.is_meta for tensor in tensors(inputs["mask"][0]))
    kept = operations.send_to_device({"mask": value}, "meta", skip_keys="mask")
    assert kept["mask"] is value


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "block grid"])
@few
@given(data)
def test_a_loader_pins_it(kind, data):
    """Without a GPU there is no pinned memory, so what would be pinned is marked."""
    value = data.draw(KINDS[kind])
    if not tensors(value):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
        pinned = pin_memory({"mask": value})["mask"]
    assert type(pinned) is type(value)
    assert all(tensor.is_meta for tensor in tensors(pinned))


class _Masks(torch.utils.data.Dataset):
    def __init__(self, masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        return self.masks[index]


def test_workers_of_a_loader_send_masks():
    masks = [BlockMask.from_dense(torch.rand(1, 2, 70, 90) < 0.5, 64, 16) for _ in range(3)]
    masks += [StripeMask.from_columns(torch.rand(1, 1, 2, 90) < 0.5, 70, 64), BlockGrid(70, 90)]
    loader = DataLoader(_Masks(masks), batch_size=None, num_workers=1)
    for found, wanted in zip(loader, masks, strict=True):
        assert_same(found, wanted)


@kinds
@few
@given(data, st.sampled_from([True, None, 3, "leaf", torch.ones(2, dtype=torch.float64)]))
def test_a_tree_takes_any_leaves(kind, data, leaf):
    value = data.draw(KINDS[kind])
    made = pytree.tree_map(lambda _: leaf, value)
    assert type(made) is type(value)
    assert repr(made)
    assert repr(pytree.tree_structure(value))
    if leaf is not None:
        assert all(each is leaf for each in pytree.tree_leaves(made))
        assert pytree.tree_structure(made) == pytree.tree_structure(value)


@kinds
@few
@given(data)
def test_paths_name_the_fields(kind, data):
    value = data.draw(KINDS[kind])
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        held = value
        for key in path:
            held = getattr(held, key.name)
        assert held is leaf


@kinds
@few
@given(data)
def test_optree(kind, data):
    try:
        from torch.utils import _cxx_pytree as cxx_pytree
    except ImportError:
        pytest.skip("optree is not installed")
    value = data.draw(KINDS[kind])
    leaves, spec = cxx_pytree.tree_flatten(value)
    assert all(a is b for a, b in zip(leaves, pytree.tree_leaves(value), strict=True))
    assert_same(cxx_pytree.tree_unflatten(leaves, spec), value)


@kinds
@given(data)
@settings(max_examples=10)
def test_a_file_without_a_field_is_refused(kind, data):
    value = data.draw(KINDS[kind])
    for name in vars(value):
        state = {key: held for key, held in vars(value).items() if key != name}
        with pytest.raises(
            ValueError, match=f"missing fields in the saved {type(value).__name__}: {name}"
        ):
            object.__new__(type(value)).__setstate__(state)


@pytest.mark.parametrize("kind", ["block mask", "stripe mask"])
@few
@given(data)
def test_a_file_with_wrong_lists_is_refused(kind, data):
    """What a file says comes to the kernels: the constructor's rules hold for it, too."""
    value = data.draw(KINDS[kind])
    name = data.draw(st.sampled_from([n for n in vars(value) if n.endswith(("counts", "len"))]))
    held = getattr(value, name)
    if held is None:
        return
    for wrong in (-1, 0.5, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(1, 1, 1)):
        changed = copy.copy(value)
        setattr(changed, name, wrong)
        with pytest.raises((TypeError, ValueError), match=name.removeprefix("partial_")):
            saved(changed, weights_only=True)


def test_stats_are_saved():
    stats = SkipStats(torch.tensor([[3]]), torch.tensor([[1]]))
    assert_same(saved(stats, weights_only=True), stats)
    assert type(unflattened(stats)) is SkipStats


def test_vmap():
    """Mapped over heads, and the same for all; printed inside, where there are no values."""
    mask = BlockMask.from_dense(torch.rand(1, 3, 70, 90) < 0.5, 64, 16)
    x = torch.randn(4)

    def count(mask, x):
        assert "BlockMask" in repr(mask)
        return mask.counts.sum() + mask.partial_counts.sum() + x.sum() * 0

    total = (mask.counts + mask.partial_counts)[0].sum(1)
    assert torch.vmap(count, in_dims=(1, None))(mask, x).equal(total.float())
    assert torch.vmap(count, in_dims=(None, 0))(mask, x).equal(total.sum().expand(4).float())
