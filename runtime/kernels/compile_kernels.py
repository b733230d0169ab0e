"""Compile csrc/ into the library: with nvcc, or for a CPU alone with a C++ compiler.

    python compile_kernels.py OUT.so

LORAEXPORT_KERNELS_CPU=1: CPU kernels alone, with $CXX or c++ or g++.
LORAEXPORT_KERNELS_ARCHS: CUDA targets, default "80 86 89 90 100 120"; the last one also as PTX.
LORAEXPORT_KERNELS_PLAIN=1: with the plain C entries of bench/plain.cc.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(__file__).resolve().parent
ARCHS = "80 86 89 90 100 120"
CPU_SOURCES = ("ops.cc", "kernel.cc", "cpu.cc")
NEEDED = (13, 0)
"""The least nvcc: from here on it knows every target of ARCHS."""


class CompileError(RuntimeError):
    """A compiler that is missing, too old, or failed; the text says which and what to do."""


def compile_library(output: Path) -> None:
    """Write the library to `output`, as the environment asks."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if os.environ.get("LORAEXPORT_KERNELS_CPU") == "1":
        _compile_cpu(output)
    else:
        _compile_cuda(output)


def _compile_cpu(output: Path) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)
    if compiler is None:
        raise CompileError("no C++ compiler: install g++, or name one in CXX")
    flags = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-shared"]
    sources = [str(FOLDER / "csrc" / name) for name in CPU_SOURCES]
    _run([compiler, *flags, "-Wl,-z,nodelete", "-o", str(output), *sources])


def _compile_cuda(output: Path) -> None:
    nvcc = find_nvcc()
    archs = os.environ.get("LORAEXPORT_KERNELS_ARCHS", ARCHS).split()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = ["-O3", "-std=c++17", "-DLORAEXPORT_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
    sources = sorted((FOLDER / "csrc").glob("*.c[cu]*"))
    sources = [path for path in sources if path.suffix in (".cc", ".cu")]
    if os.environ.get("LORAEXPORT_KERNELS_PLAIN") == "1":
        sources.append(FOLDER / "bench" / "plain.cc")
    with TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{path.name}.o" for path in sources]
        commands = [
            [*nvcc, *flags, *targets, "-c", "-o", str(made), str(source)]
            for made, source in zip(objects, sources, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_run, commands))
        # The runtime of CUDA is in the library, libcuda and cuBLAS are not: it loads without them.
        link = ["-shared", "-cudart=static", "-Xlinker=-z,nodelete", "-ldl"]
        _run([*nvcc, *link, "-o", str(output), *map(str, objects)])


def find_nvcc() -> list[str]:
    """nvcc and what it has to be told: the system's, else that of the package nvidia-cuda-nvcc.

    Raises:
        CompileError: there is none, or it is too old.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    command = [found] if found else _packaged_nvcc()
    if not command:
        raise CompileError(
            "no nvcc: install CUDA 13's toolkit or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl"
            " nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm` (13.0 or later), or build the CPU"
            " kernels alone with LORAEXPORT_KERNELS_CPU=1"
        )
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    release = said.stdout.partition("release ")[2].partition(",")[0]
    if tuple(map(int, release.split("."))) < NEEDED:
        raise CompileError(f"{command[0]} is of CUDA {release}: 13.0 or later is needed")
    return command


def _packaged_nvcc() -> list[str]:
    """PyPI's packages of CUDA 13 share the folder nvidia/cu13, laid out as a toolkit is."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        nvcc = Path(place) / "cu13" / "bin" / "nvcc"
        if nvcc.is_file():
            return [str(nvcc), f"-L{nvcc.parents[1] / 'lib'}"]
    return []


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")


if __name__ == "__main__":
    try:
        compile_library(Path(sys.argv[1]))
    except CompileError as error:
        sys.exit(f"loraexport-kernels: {error}")
