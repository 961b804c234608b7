"""Types of the errors of the ops, which reach Python as RuntimeError."""

from __future__ import annotations

NOT_IMPLEMENTED = "NotImplementedError: "  # kNotImplemented of core/errors.h


def on_cpu_only(what: str, otherwise: str = "") -> NotImplementedError:
    """Makes the error of a call with CUDA tensors for which only the CPU has kernels yet.

    Args:
        otherwise: what else to do, such as " or leave it out".
    """
    return NotImplementedError(
        f"{what} runs on the CPU only; move the tensors to the CPU{otherwise}"
    )


def typed(error: Exception) -> Exception:
    """Returns the NotImplementedError that the text of an op's error stands for, else the error."""
    text = str(error)
    if text.startswith(NOT_IMPLEMENTED):
        return NotImplementedError(text.removeprefix(NOT_IMPLEMENTED))
    return error
