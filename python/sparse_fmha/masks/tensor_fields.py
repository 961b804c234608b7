"""Base of objects with tensors and plain values, such as masks: moving, saving and tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T", bound="TensorFields")
# Context of a pytree node: the names of the fields with a leaf, and the values of plain fields.
Context = tuple[tuple[str, ...], tuple[Any, ...]]


class TensorFields:
    """Base class of objects that hold tensors; `register` each subclass.

    Attributes:
        TENSORS: names of the fields that hold a tensor, another such object, or None.
        PLAIN: names of the other fields: numbers, bools, strings, tuples of these, a device.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ()
    PLAIN: ClassVar[tuple[str, ...]] = ()

    def to(
        self: T,
        device: torch.device | str | int | None = None,
        dtype: None = None,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> T:
        """Returns the object on another device; self if all tensors are there, unless `copy`.

        Args:
            device: target device; None leaves each tensor where it is.
            dtype: must be None; it keeps the argument order of `torch.Tensor.to`.
            non_blocking, copy: as in `torch.Tensor.to`.

        Raises:
            TypeError: a dtype is given; the dtypes of the tensors are fixed.
        """
        self._check_target(device, dtype)
        return self._map_tensors(
            lambda tensor: tensor.to(device=device, non_blocking=non_blocking, copy=copy),
            may_be_self=not copy,
        )

    def pin_memory(self: T) -> T:
        """Returns a copy in pinned memory; `DataLoader(pin_memory=True)` calls it."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores fields for `pickle`, `copy` and `torch.load`; checks them: files may be wrong.

        Raises:
            ValueError, TypeError: fields are missing or invalid.
        """
        missing = [name for name in (*self.TENSORS, *self.PLAIN) if name not in state]
        if missing:
            raise ValueError(
                f"missing fields in the saved {type(self).__name__}: {', '.join(missing)}"
            )
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self._check_fields()

    def _repr_of_unfit(self) -> str | None:
        """Returns a plain repr if the fields are invalid (after `tree_map` or vmap), else None."""
        try:
            self._check_fields()
        except (TypeError, ValueError):
            fields = (f"{name}={getattr(self, name)!r}" for name in (*self.TENSORS, *self.PLAIN))
            return f"{type(self).__name__}({', '.join(fields)})"
        return None

    def _check_fields(self) -> None:
        """Raises if the fields do not match each other; never waits for the device."""

    def _check_target(self, device: object, dtype: object) -> None:
        given = device if isinstance(device, torch.dtype) else dtype
        if given is not None:
            raise TypeError(
                f"dtype must be None, because the dtypes of a {type(self).__name__} are fixed, got "
                f"{given}"
            )

    def _map_tensors(self: T, function: Callable[[Any], Any], may_be_self: bool = True) -> T:
        fields = {name: getattr(self, name) for name in self.TENSORS}
        mapped = {
            name: None if value is None else function(value) for name, value in fields.items()
        }
        if may_be_self and all(mapped[name] is fields[name] for name in fields):
            return self
        plain = {name: getattr(self, name) for name in self.PLAIN}
        return _build(type(self), plain | mapped)


def register(cls: type[T], name: str) -> None:
    """Registers a class with torch: as a pytree node, and for `torch.load(weights_only=True)`.

    The leaves are the tensors that are not None. Everything else is the node's context, so two
    objects have the same tree structure only if their contexts are equal. Unflattening takes any
    leaves and checks nothing.

    Args:
        name: identifies the class in saved exported programs; must never change.
    """

    def flatten(value: T) -> tuple[list[Any], Context]:
        leaves = _leaves(value)
        plain = tuple(getattr(value, field) for field in cls.PLAIN)
        return list(leaves.values()), (tuple(leaves), plain)

    def flatten_with_keys(value: T) -> tuple[list[tuple[pytree.KeyEntry, Any]], Context]:
        _, context = flatten(value)
        leaves = _leaves(value).items()
        return [(pytree.GetAttrKey(field), leaf) for field, leaf in leaves], context

    def unflatten(leaves: Any, context: Context) -> T:
        there, plain = context
        fields = dict.fromkeys(cls.TENSORS) | dict(zip(cls.PLAIN, plain, strict=True))
        return _build(cls, fields | dict(zip(there, leaves, strict=True)))

    def dump(context: Context) -> list[Any]:
        there, plain = context
        return [there, [str(x) if isinstance(x, torch.device) else x for x in plain]]

    def load(dumped: list[Any]) -> Context:
        there, plain = dumped
        named = zip(cls.PLAIN, plain, strict=True)
        values = [torch.device(x) if field == "device" else _tuples(x) for field, x in named]
        return tuple(there), tuple(values)

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=name,
        to_dumpable_context=dump,
        from_dumpable_context=load,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls])


def has_values(tensor: Tensor) -> bool:
    """Whether the host can read the values: not a meta, traced, vmapped or distributed tensor."""
    plain = type(tensor) is Tensor and tensor.device.type != "meta"
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _leaves(value: TensorFields) -> dict[str, Any]:
    fields = {field: getattr(value, field) for field in value.TENSORS}
    return {field: leaf for field, leaf in fields.items() if leaf is not None}


def _build(cls: type[T], fields: dict[str, Any]) -> T:
    """Creates an object with these fields without calling its constructor."""
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _tuples(value: Any) -> Any:
    """Converts lists back to tuples, which JSON does not have."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
