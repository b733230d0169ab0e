"""Repeat the proof, anywhere."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraexport_runtime import AdapterError, ArtifactError, WeightsError
from loraexport_runtime.checking import decoder as stored_decoder
from loraexport_runtime.checking import layers as stored_layers
from loraexport_runtime.checking import model as stored_model
from loraexport_runtime.contract.manifest import Manifest, Model

from ..bases.adapters import load_adapters
from ..bases.layers import build_modules, load_base
from ..bases.weights import Base
from ..errors import BaseModelError, UsageError
from ..parity.implementations import default_providers
from ..parity.layers.check import check
from ..parity.layers.reference import make_reference
from ..parity.report import Report
from ..plan.plan import Plan, make_plan
from ..spec.reader import read_spec


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
    spec_file = folder / "spec.yaml"
    if not spec_file.is_file():
        raise ArtifactError(f"{spec_file}: missing; copy the whole artifact")
    spec = read_spec(spec_file)
    if base_directory is not None:
        if spec.base.path is None:
            raise UsageError(f"{folder}: its base is drawn from a seed; leave --base out")
        path = str(base_directory.absolute())
        spec = spec.model_copy(update={"base": spec.base.model_copy(update={"path": path})})
    chosen = providers or default_providers(manifest)
    try:
        plan = make_plan(spec, folder)
        return _check_with_base(folder, manifest, plan, chosen)
    except (BaseModelError, WeightsError, AdapterError) as error:
        if base_directory is not None:
            raise
        source = f"the stored cases (no base here: {error}; give it with --base)"
    if manifest.generator is not None:
        from ..parity.decoder import check as verify_decoder

        kept = replace(stored_decoder.load_reference(folder, manifest), source=source)
        return verify_decoder.check_decoder(
            folder, manifest, spec, kept, "the base is not here", chosen
        )
    if manifest.model is not None:
        from ..parity.model import check as verify_model

        stored = replace(
            stored_model.load_reference(folder, manifest, manifest.model), source=source
        )
        return verify_model.check_model(
            folder, manifest, manifest.model, spec, stored, "the base is not here", chosen
        )
    segments = replace(stored_layers.load_reference(folder, manifest), source=source)
    return check(folder, manifest, spec, segments, (), chosen)


def _check_with_base(
    folder: Path, manifest: Manifest, plan: Plan, providers: Sequence[str]
) -> Report:
    """Against the oracle. Raises BaseModelError if the base is not the artifact's."""
    if manifest.generator is not None:
        from ..bases import grafted
        from ..parity.decoder import check as verify_decoder
        from ..parity.decoder import reference as decoder_reference
        from ..parity.decoder.sources import open_decoder

        _require_same(grafted.load_base(plan), manifest, plan)
        decoder = open_decoder(plan, folder, manifest)
        seed = plan.spec.parity.seed
        decoded = decoder_reference.make_reference(folder, decoder, manifest, seed)
        plain = grafted.plain_directory(plan)
        return verify_decoder.check_decoder(folder, manifest, plan.spec, decoded, plain, providers)
    if manifest.model is not None:
        return _check_model(folder, manifest, manifest.model, plan, providers)
    base = load_base(plan)
    _require_same(base, manifest, plan)
    modules = build_modules(plan, base, load_adapters(plan, base))
    oracle = make_reference(folder, manifest, plan.spec, base)
    return check(folder, manifest, plan.spec, oracle, modules, providers)


def _check_model(
    folder: Path, manifest: Manifest, model: Model, plan: Plan, providers: Sequence[str]
) -> Report:
    from ..bases import grafted
    from ..bases.model import ModelModules, load_model
    from ..parity.model import check as verify_model
    from ..parity.model import reference as model_reference
    from ..parity.model.graph_model import open_rows
    from ..parity.model.plain_model import PlainModel
    from ..parity.oracle import read_adapters

    oracle: model_reference.ReferenceModel
    plain: tuple[ModelModules, Path] | str
    if plan.graph:
        _require_same(grafted.load_base(plan), manifest, plan)
        graph = grafted.load_graph(plan, folder)
        oracle = open_rows(plan, folder, manifest, graph)
        plain = str(grafted.plain_directory(plan))
    else:
        assert plan.model is not None, "spec and manifest are of one kind"
        base, modules = load_model(plan)
        _require_same(base, manifest, plan)
        directory, adapters = plan.model.directory, read_adapters(folder, manifest)
        oracle = PlainModel(directory, manifest, model, adapters)
        plain = modules, directory
    seed = plan.spec.parity.seed
    reference = model_reference.make_reference(oracle, manifest, model, seed)
    return verify_model.check_model(folder, manifest, model, plan.spec, reference, plain, providers)


def _require_same(base: Base, manifest: Manifest, plan: Plan) -> None:
    if base.digest != manifest.base.digest:
        raise BaseModelError(
            f"{plan.base_source}: its weights differ from those that the artifact was built from"
        )
