"""The installed package as a kernel repository of Hugging Face's package `kernels`.

from sparse_fmha.integrations.hub import write_kernel
write_kernel("sparse_fmha_kernel")

import kernels, pathlib  # elsewhere, without sparse_fmha and without a network
sparse_fmha = kernels.get_local_kernel(pathlib.Path("sparse_fmha_kernel"))
"""

from __future__ import annotations

import json
import platform
import shutil
from os import PathLike
from pathlib import Path

import sparse_fmha
from sparse_fmha import _build

__all__ = ["write_kernel"]

ABI = "torch-stable-abi210"  # the library needs torch 2.10 or newer
CODE = '''"""sparse_fmha, from this folder."""

import sys
from pathlib import Path

if "sparse_fmha" not in sys.modules:
    sys.path.insert(0, str(Path(__file__).parent))

import sparse_fmha
from sparse_fmha import *  # noqa: F403

if sparse_fmha.__version__ != VERSION:
    raise ImportError(
        f"another version of sparse_fmha was imported before, {sparse_fmha.__version__}; this is "
        f"{VERSION}"
    )
__all__ = sparse_fmha.__all__
'''


def write_kernel(directory: str | PathLike[str]) -> Path:
    """Writes the installed package with its libraries in the layout of a kernel repository.

    `kernels.get_local_kernel(directory)` loads it, and the Hub takes it. There is a variant for the
    CPU, and one for the version of CUDA if the library has GPU kernels, each for this machine's
    architecture and Linux. A program that loads it can import `sparse_fmha` afterwards.

    Args:
        directory: is made where it does not exist; variants of these names are replaced.

    Returns:
        the directory, absolute.

    Raises:
        OSError: the directory cannot be written.
        ImportError: the extension `_C` is not installed.
    """
    root, package = Path(directory).resolve(), Path(sparse_fmha.__file__).parent
    backends = {"cpu": "cpu"}
    if cuda := _build.build_info()["cuda"]:
        major, minor, *_ = cuda.split(".")
        backends["cuda"] = f"cu{major}{minor}"
    for backend, name in backends.items():
        folder = root / "build" / f"{ABI}-{name}-{platform.machine()}-linux"
        shutil.rmtree(folder, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, folder / "sparse_fmha", ignore=ignored)
        metadata = {
            "id": f"sparse_fmha_kernel_{name}",  # the name of the loaded module
            "name": "sparse-fmha",
            "version": 1,
            "license": "BSD-3-Clause",
            "python-depends": [],
            "backend": {"type": backend},
        }
        # Without it, the package has no version where it is not installed as well.
        distribution = folder / f"sparse_fmha-{sparse_fmha.__version__}.dist-info"
        distribution.mkdir()
        (distribution / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: sparse-fmha\nVersion: {sparse_fmha.__version__}\n"
        )
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        code = CODE.replace("VERSION", repr(sparse_fmha.__version__))
        (folder / "__init__.py").write_text(code)
    return root
