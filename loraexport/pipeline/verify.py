"""Repeat the proof, anywhere: load, the same base, prove."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraexport_runtime import AdapterError, ArtifactError, WeightsError
from loraexport_runtime.contract.manifest import Manifest

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
) -> Report:
    """Repeat an artifact's parity, perhaps on another machine.

    The base is taken from `base_directory` or where the spec says, if its digest is the
    artifact's; else the stored cases are the reference, and the report says so.

    Raises:
        ArtifactError: the artifact is damaged, or holds no spec.
        BaseModelError: `base_directory` was given and is not the artifact's base.
        ProviderError: a provider cannot run here.
        UsageError: `base_directory` was given for a base that a seed makes.
    """
    manifest.check_files(folder)
    spec = _read_spec(folder, base_directory)
    recipe = RECIPES[manifest.kind.tag]
    chosen = providers or default_providers(manifest)
    subject = Subject(folder, manifest, manifest.kind, spec, chosen, keep_cases=False)
    try:
        return recipe.prove(subject, _load_base(folder, manifest, spec))
    except (BaseModelError, WeightsError, AdapterError) as error:
        if base_directory is not None:
            raise
        source = f"the stored cases (no base here: {error}; give it with --base)"
    return replace(recipe.prove(subject, None), reference=source)


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
    path = str(base_directory.absolute())
    return spec.model_copy(update={"base": spec.base.model_copy(update={"path": path})})
