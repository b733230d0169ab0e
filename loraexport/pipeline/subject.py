"""What a proof is about: an artifact's folder, still in staging or published."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from loraexport_runtime.contract.kinds import Kind
from loraexport_runtime.contract.manifest import Manifest

from ..spec.schema import Spec

KindT = TypeVar("KindT", bound=Kind, covariant=True)


@dataclass(frozen=True)
class Subject(Generic[KindT]):
    """The graphs that are proven, and on what."""

    folder: Path
    manifest: Manifest
    kind: KindT
    """The manifest's own."""
    spec: Spec
    providers: Sequence[str]
    """onnxruntime's names, on which the ONNX graphs run."""
    torchscript: bool
    """Run the TorchScript graphs, which may hold any code: a build's own are its own."""
    keep_cases: bool
    """Write the cases into the folder, for a proof where the base is not."""
