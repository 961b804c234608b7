"""Objects of tensors and plain values, such as masks: how they are moved, saved and traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T", bound="TensorFields")
# Of a pytree node: the fields that have a leaf, and the values of the plain ones.
Context = tuple[tuple[str, ...], tuple[Any, ...]]


class TensorFields:
    """Base of the objects that follow their tensors; `register` each subclass.

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
        """The same on another device; itself where all tensors are there, unless `copy`.

        Args:
            device: None: each tensor stays where it is.
            dtype: None; it has the place that `torch.Tensor.to` gives it.
            non_blocking, copy: as of `torch.Tensor.to`.

        Raises:
            TypeError: a dtype is given: those of the tensors are fixed.
        """
        self._check_target(device, dtype)
        return self._map_tensors(
            lambda tensor: tensor.to(device=device, non_blocking=non_blocking, copy=copy),
            may_be_self=not copy,
        )

    def pin_memory(self: T) -> T:
        """The same in pinned memory; `DataLoader(pin_memory=True)` calls it."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `pickle`, `copy` and `torch.load` fill; checked, since a file may say anything.

        Raises:
            ValueError, TypeError: fields are missing, or are not as the constructor allows.
        """
        missing = [name for name in (*self.TENSORS, *self.PLAIN) if name not in state]
        if missing:
            raise ValueError(f"the saved {type(self).__name__} has no {', '.join(missing)}")
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self._check_fields()

    def _repr_of_unfit(self) -> str | None:
        """None where they fit together; `tree_map` and vmap may put anything there."""
        try:
            self._check_fields()
        except (TypeError, ValueError):
            fields = (f"{name}={getattr(self, name)!r}" for name in (*self.TENSORS, *self.PLAIN))
            return f"{type(self).__name__}({', '.join(fields)})"
        return None

    def _check_fields(self) -> None:
        """Raises where the fields do not fit together; never waits for the device."""

    def _check_target(self, device: object, dtype: object) -> None:
        given = device if isinstance(device, torch.dtype) else dtype
        if given is not None:
            raise TypeError(
                f"dtype is {given}; the dtypes of a {type(self).__name__} are fixed, only a device "
                "is allowed"
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
    """Makes a class known to torch: as a pytree node, and to `torch.load(weights_only=True)`.

    Leaves are the tensors that are there. All else is the node's context, so two objects have one
    tree structure only if they agree in it. Unflattening takes any leaves and checks nothing.

    Args:
        name: the class in exported programs that are saved; never to be changed.
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
    """Whether the host can read it: no tensor of shapes alone, of a trace, of vmap, no DTensor."""
    plain = type(tensor) is Tensor and tensor.device.type != "meta"
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _leaves(value: TensorFields) -> dict[str, Any]:
    fields = {field: getattr(value, field) for field in value.TENSORS}
    return {field: leaf for field, leaf in fields.items() if leaf is not None}


def _build(cls: type[T], fields: dict[str, Any]) -> T:
    """An object of these fields, past its constructor."""
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _tuples(value: Any) -> Any:
    """JSON has lists where there were tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
