"""Repeat the proof, anywhere: load, the same base, prove."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraexport_runtime.contract.graphs import check_graphs
from loraexport_runtime.contract.kinds import Layers, Model
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import AdapterError, ArtifactError, LoraexportError, WeightsError

from ..errors import BaseModelError, UsageError
from ..parity.implementations import default_providers
from ..parity.report import Report
from ..plan.plan import make_plan
from ..spec.reader import read_spec
from ..spec.schema import Spec
from .recipe import RECIPES, Loaded
from .subject import Subject


def verify_artifact(
    folder: Path,
    manifest: Manifest,
    base_directory: Path | None = None,
    providers: Sequence[str] | None = None,
    torchscript: bool = False,
) -> Report:
    """Repeat an artifact's parity, perhaps on another machine.

    The base is taken from `base_directory` or where the spec says, if its digest is the
    artifact's; else the stored cases are the reference, and the report says so. A relative path
    of the spec is looked for from the working directory, and from the folders around the artifact,
    where the spec lay when it was built.

    Raises:
        ArtifactError: the artifact is damaged, or holds no spec.
        BaseModelError: `base_directory` was given and is not the artifact's base.
        ProviderError: a provider cannot run here.
        UsageError: `base_directory` was given for a base that a seed makes, or the artifact has
            TorchScript alone and `torchscript` is False: a file of it may hold any code.
    """
    manifest.check_files(folder)
    if not torchscript and not _has_onnx(manifest):
        raise UsageError(
            f"{folder}: it has TorchScript alone, which is code that the artifact brings. Where you"
            " trust it, verify it with --torchscript (torchscript=True)"
        )
    check_graphs(folder, manifest)
    spec = _read_spec(folder, base_directory)
    recipe = RECIPES[manifest.kind.tag]
    chosen = providers or default_providers(manifest)
    subject = Subject(
        folder, manifest, manifest.kind, spec, chosen, torchscript=torchscript, keep_cases=False
    )
    reason: LoraexportError | None = None
    for candidate in [spec] if base_directory else _candidates(folder, spec):
        try:
            loaded = _load_base(folder, manifest, candidate)
        except (BaseModelError, WeightsError, AdapterError) as error:
            if base_directory is not None:
                raise
            reason = reason or error
            continue
        return recipe.prove(subject, loaded)
    source = f"the stored cases (no base here: {reason}; give it with --base)"
    return replace(recipe.prove(subject, None), reference=source)


def _candidates(folder: Path, spec: Spec) -> list[Spec]:
    """The spec with its base wherever a relative path may have meant; by digest one is it."""
    path = spec.base.path
    if path is None or path.startswith("package:") or Path(path).is_absolute():
        return [spec]
    starts = [Path.cwd(), *folder.absolute().parents[:2]]
    places = dict.fromkeys(start / path for start in starts if os.path.isdir(start / path))
    return [_with_base(spec, place) for place in places] or [spec]


def _has_onnx(manifest: Manifest) -> bool:
    """Whether there are ONNX graphs: all kinds have them where TorchScript is not all."""
    match manifest.kind:
        case Model() as model:
            return model.onnx is not None
        case Layers():
            return all(layer.onnx for layer in manifest.layers)
        case _:
            return True


def _load_base(folder: Path, manifest: Manifest, spec: Spec) -> Loaded:
    """The artifact's base. Raises BaseModelError if it is another one."""
    plan = make_plan(spec, folder)
    if plan.kind.tag != manifest.kind.tag:
        raise BaseModelError(
            f"{plan.base_source}: it is a {plan.kind.tag}, and the artifact is a"
            f" {manifest.kind.tag}; give the base that it was built from"
        )
    loaded: Loaded = RECIPES[plan.kind.tag].load(plan)
    if loaded.base.digest != manifest.base.digest:
        raise BaseModelError(
            f"{plan.base_source}: its weights differ from those that the artifact was built from"
        )
    return loaded


def _read_spec(folder: Path, base_directory: Path | None) -> Spec:
    """The spec that the artifact carries, with its base taken from another place if so asked."""
    spec_file = folder / "spec.yaml"
    if not spec_file.is_file():
        raise ArtifactError(f"{spec_file}: missing; copy the whole artifact")
    spec = read_spec(spec_file)
    if base_directory is None:
        return spec
    if spec.base.path is None:
        raise UsageError(f"{folder}: its base is drawn from a seed; leave --base out")
    return _with_base(spec, base_directory.absolute())


def _with_base(spec: Spec, directory: Path) -> Spec:
    base = spec.base.model_copy(update={"path": str(directory)})
    return spec.model_copy(update={"base": base})
