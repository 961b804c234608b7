"""Numbers and flags for each axis, as options have them."""

from __future__ import annotations


def sequence_of(option: str, text: str) -> tuple[int, ...]:
    """30x48x80 as a tuple."""
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; numbers such as 30x48x80 are needed") from None


def numbers_of(option: str, text: str) -> int | tuple[int, ...]:
    """As `sequence_of`, but a single number as it is."""
    values = sequence_of(option, text)
    return values if len(values) > 1 else values[0]


def flags_of(option: str, text: str) -> tuple[bool, ...] | bool:
    """0x0x1 as flags; a single one as it is."""
    flags = text.split("x")
    if set(flags) - {"0", "1"}:
        raise ValueError(f"{option} is {text!r}; 0 or 1 for each axis, such as 0x0x1, is needed")
    return tuple(flag == "1" for flag in flags) if len(flags) > 1 else text == "1"
