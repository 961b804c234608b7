"""The folder that the package `kernels` loads in place of `shi-labs/natten` of the Hub."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

REPOSITORY = "shi-labs/natten"
BACKENDS = ("cpu", "cuda")
NAMES = ("merge_attentions", "na1d", "na2d", "na3d")
CODE = f'''"""NATTEN's functions, by sparse_fmha."""

from sparse_fmha.integrations.natten import {", ".join(NAMES)}

__all__ = {list(NAMES)!r}
'''


def write_local_kernel(directory: str | PathLike[str]) -> str:
    """Writes the layout of a kernel for the package `kernels` of Hugging Face.

    With what it returns in the environment variable LOCAL_KERNELS, `kernels.get_kernel(
    "shi-labs/natten", version=1)` loads `sparse_fmha.integrations.natten` from any program,
    without a network. So diffusers' `LTX2VideoVaeNeighborhoodNattenProcessor` runs on it unchanged.
    The files import the installed `sparse_fmha`; they hold no code of kernels themselves.

    Args:
        directory: is made where it does not exist; its files of these names are replaced.

    Returns:
        the value of LOCAL_KERNELS, `shi-labs/natten=DIRECTORY`, absolute.

    Raises:
        OSError: the directory cannot be written.
        ValueError: its path has a colon, which separates entries of LOCAL_KERNELS.
    """
    root = Path(directory).resolve()
    if ":" in str(root):
        raise ValueError(
            f"directory must be a path without a colon, for LOCAL_KERNELS, got {str(root)!r}"
        )
    for backend in BACKENDS:
        folder = root / "build" / f"torch-{backend}"
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"sparse_fmha_natten_{backend}",  # the name of the loaded module
            "name": "natten",
            "version": 1,
            "license": "BSD-3-Clause",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        (folder / "__init__.py").write_text(CODE)
    return f"{REPOSITORY}={root}"
