"""PEP 517 backend: setuptools, with build requirements that depend on what is installed.

torch   from the environment that the package is for, even if the build is isolated from it
        (locate.py), or from the directory SPARSE_FMHA_TORCH. If there is none, the build stops with
        a one-line error, unless SPARSE_FMHA_TORCH is a requirement, such as torch==2.13.0.
CUTLASS the same way. If it is missing and GPU kernels are built, it is required from the package
        index: headers of 30 MB.
"""

import setuptools
from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import locate

# pip asks for build requirements only if it isolates the build.
OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"error: setuptools {setuptools.__version__} is too old; building takes "
        f"{OLDEST_SETUPTOOLS} or newer: "
        "pip install -U setuptools, or leave out --no-build-isolation"
    )


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _inputs()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _inputs()


def _inputs() -> list[str]:
    required = []
    if locate.torch_requirement():
        required.append(locate.torch_requirement())
    else:
        try:
            locate.torch()
        except LookupError as error:
            raise SystemExit(f"error: {error}") from None
    try:
        builds_gpu_kernels = locate.builds_gpu_kernels()
    except LookupError as error:
        raise SystemExit(f"error: {error}") from None
    if builds_gpu_kernels:
        try:
            locate.cutlass()
        except LookupError:
            required.append(locate.PINNED_CUTLASS)
    return required
