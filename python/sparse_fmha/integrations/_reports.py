"""Reports options without effect, each once."""

from __future__ import annotations

import warnings


class Reports:
    """Warns (UserWarning) once per name; a copy does not repeat the warnings of its original."""

    def __init__(self) -> None:
        self.made: set[str] = set()

    def __call__(self, name: str, message: str) -> None:
        if name not in self.made:
            self.made.add(name)
            warnings.warn(message, stacklevel=2)
