"""The custom-op library with the kernels of loraexport's graphs, for onnxruntime.

options.register_custom_ops_library(str(loraexport_kernels.library_path()))
"""

from pathlib import Path

from .version import __version__

__all__ = ["__version__", "library_path", "supported"]

_LEAST = (8, 0)
"""bfloat16 products on tensor cores begin here."""


def library_path() -> Path:
    """Where the installed library lies.

    Raises:
        FileNotFoundError: the package was not built: it is a folder of sources.
    """
    path = Path(__file__).resolve().parent / "libloraexport_kernels.so"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: build it with `pip install` of this package")
    return path


def supported(compute_capability: tuple[int, int]) -> bool:
    """Whether a CUDA device of this compute capability runs the kernels.

    Args:
        compute_capability: major and minor, (9, 0) for Hopper.
    """
    return compute_capability >= _LEAST
