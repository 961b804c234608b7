"""Types of the errors of the ops, which reach Python as RuntimeError."""

from __future__ import annotations

NOT_IMPLEMENTED = "NotImplementedError: "  # kNotImplemented of core/errors.h


def typed(error: Exception) -> Exception:
    """Returns the NotImplementedError that the text of an op's error stands for, else the error."""
    text = str(error)
    if text.startswith(NOT_IMPLEMENTED):
        return NotImplementedError(text.removeprefix(NOT_IMPLEMENTED))
    return error
