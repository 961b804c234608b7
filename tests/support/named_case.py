"""Cases of tests that are named by what is special about them."""

import dataclasses


class NamedCase:
    """Base of a frozen dataclass."""

    def __str__(self):
        """What is not the default; the names of tests are made of it."""
        given = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return " ".join(f"{f.name}={value}" for f, value in given if value != f.default)

    def with_(self, **changes):
        return dataclasses.replace(self, **changes)
