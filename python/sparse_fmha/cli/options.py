"""Parses options with a number or flag for each axis."""

from __future__ import annotations


def sequence_of(option: str, text: str) -> tuple[int, ...]:
    """Parses text such as 30x48x80 to a tuple."""
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"{option} must be numbers such as 30x48x80, got {text!r}") from None


def numbers_of(option: str, text: str) -> int | tuple[int, ...]:
    """Like `sequence_of`, but returns a single number as an int."""
    values = sequence_of(option, text)
    return values if len(values) > 1 else values[0]


def flags_of(option: str, text: str) -> tuple[bool, ...] | bool:
    """Parses text such as 0x0x1 to flags; returns a single flag as a bool."""
    flags = text.split("x")
    if set(flags) - {"0", "1"}:
        raise ValueError(f"{option} must be 0 or 1 for each axis, such as 0x0x1, got {text!r}")
    return tuple(flag == "1" for flag in flags) if len(flags) > 1 else text == "1"
