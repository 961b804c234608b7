"""Bytes of tensors that are alive at once, by their storages; on the meta device at any size."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class LiveBytes:
    """What a dispatch mode knows of the tensors that its ops make."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def hold(self, made: Iterable[Tensor], given: Iterable[Tensor]) -> None:
        """Counts the results of an op until they are freed, but for views of its arguments."""
        known = {x.untyped_storage()._cdata for x in given}
        for x in made:
            storage = x.untyped_storage()
            key = storage._cdata
            if key in known or key in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
