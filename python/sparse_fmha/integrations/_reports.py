"""Options that have no effect, each reported once."""

from __future__ import annotations

import warnings


class Reports:
    """Warns (UserWarning) once of each name; a copy has reported what its original had."""

    def __init__(self) -> None:
        self.made: set[str] = set()

    def __call__(self, name: str, message: str) -> None:
        if name not in self.made:
            self.made.add(name)
            warnings.warn(message, stacklevel=2)
