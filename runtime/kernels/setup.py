"""The wheel of loraexport-kernels holds a compiled library, so it is of one platform."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compile_kernels import CompileError, compile_library


class BuildLibrary(build_py):
    """Modules, then the library beside them: in the sources where the install is editable."""

    def run(self) -> None:
        super().run()
        folder = "" if self.editable_mode else self.build_lib
        try:
            compile_library(Path(folder) / "loraexport_kernels" / "libloraexport_kernels.so")
        except CompileError as error:
            sys.exit(f"loraexport-kernels: {error}")


class PlatformWheel(bdist_wheel):
    """Of this platform, for every Python 3: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=WithLibrary,
    cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel},
)
