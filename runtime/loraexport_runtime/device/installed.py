"""What has to be there before anything else is imported: a platform, and one onnxruntime."""

import importlib.util
import sys
import warnings
from importlib.metadata import PackageNotFoundError, distribution

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
"""Either will do; both install the one module onnxruntime."""


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
    if all(map(_is_installed, DISTRIBUTIONS)):
        warnings.warn(
            "onnxruntime and onnxruntime-gpu are both installed, into the same folder, so that CUDA"
            " is there or not as it happens: pip uninstall onnxruntime onnxruntime-gpu, then"
            " install the one that you want",
            RuntimeWarning,
            stacklevel=3,
        )


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
