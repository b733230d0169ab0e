"""`python -m loraexport_runtime check`, and artifacts with planted faults."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from loraexport_runtime.adapters.files import digest_adapter
from loraexport_runtime.contract.files import digest_file
from support.manifests import edit_manifest
from support.torch_free import BLOCKED

_TORCH_FREE = f"""
import importlib.abc, runpy, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
runpy.run_module("loraexport_runtime", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Done:
    """What the command left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


def run_check(*arguments: object) -> Done:
    """The command in a process of its own, where neither torch nor the exporter can be imported."""
    command = [sys.executable, "-W", "error", "-c", _TORCH_FREE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


def seal(folder: Path) -> None:
    """Let the manifest vouch for the files as they are now, as it does after a wrong build."""

    def change(data: dict[str, Any]) -> None:
        for path, entry in data["files"].items():
            entry["sha256"] = digest_file(folder / path)
            entry["size"] = (folder / path).stat().st_size
        for adapter in data["adapters"]:
            adapter["digest"] = digest_adapter(folder / adapter["path"])

    edit_manifest(folder, change)


def scale_adapter(folder: Path, name: str, factor: float) -> None:
    """Multiply every B of an adapter that the artifact carries, and seal the artifact."""
    file = folder / "adapters" / name / "adapter_model.safetensors"
    tensors = load_file(file)
    scaled = {
        key: (tensor * np.float32(factor)).astype(tensor.dtype) if "_B" in key else tensor
        for key, tensor in tensors.items()
    }
    save_file(scaled, file)
    seal(folder)


def swap_slots(folder: Path) -> None:
    """Give the first two adapters each other's slot."""

    def change(data: dict[str, Any]) -> None:
        first, second = data["adapters"][:2]
        first["slot"], second["slot"] = second["slot"], first["slot"]

    edit_manifest(folder, change)
