"""Options that have no effect, each reported once."""

from __future__ import annotations

import warnings


class Reports:
    """Warns (UserWarning) of each thing once; a copy has reported what its original had."""

    def __init__(self) -> None:
        self.made: set[str] = set()

    def __call__(self, message: str, key: str | None = None) -> None:
        """`key` is what counts as the same thing; by default the message."""
        key = message if key is None else key
        if key not in self.made:
            self.made.add(key)
            warnings.warn(message, stacklevel=2)
