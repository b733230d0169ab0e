"""What has to be there before anything else is imported: a platform, and one onnxruntime."""

import importlib
import importlib.util
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, distribution

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
"""Either will do; both install the one module onnxruntime."""

LEAST_VERSION = (1, 31)
"""Of onnxruntime, as pyproject.toml asks for it: what is older lacks OrtValues that share memory,
or cannot read the graphs' operators. pip does not hold whoever installs with --no-deps to that,
nor another package that brings a plain onnxruntime into the same folder."""

_MEND = (
    f"pip uninstall -y {' '.join(DISTRIBUTIONS)}, then pip install onnxruntime-gpu"
    " (or onnxruntime, for the CPU alone)"
)


def check_installed() -> None:
    """Raise ImportError where the runtime cannot work, and warn where two onnxruntimes collide.

    A warning and no log line, as whoever installs the service can mend it, and should.
    """
    if sys.platform == "win32":
        raise ImportError(
            "loraexport-runtime does not support Windows; use Linux, or WSL 2 or a Linux container"
            " on Windows"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise ImportError(
            "loraexport-runtime needs onnxruntime: pip install onnxruntime-gpu for CUDA on Linux"
            " x86-64, or pip install onnxruntime for the CPU"
        )
    _check_version(getattr(importlib.import_module("onnxruntime"), "__version__", None))
    if all(map(_is_installed, DISTRIBUTIONS)):
        warnings.warn(
            "onnxruntime and onnxruntime-gpu are both installed, into the same folder, so that CUDA"
            f" is there or not as it happens: {_MEND}",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_version(version: str | None) -> None:
    """Raise ImportError for an onnxruntime that is too old, or of which files are missing.

    Args:
        version: as the module itself has it, since the metadata of two may contradict each other;
            None: it has none, which is what the uninstallation of one of the two leaves.
    """
    if version is None:
        raise ImportError(
            "the module onnxruntime is there, but not whole, as after one of two distributions of"
            f" it was uninstalled: {_MEND}"
        )
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ImportError(
            f"loraexport-runtime needs onnxruntime {least} or later, and this one is {version}:"
            f" {_MEND}"
        )


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
