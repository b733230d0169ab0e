"""YAML -> Spec, or every problem at once."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from loraexport_runtime.contract.strict_yaml import read_yaml

from ..errors import SpecError
from .problems import SPEC, schema_problems
from .rules import cross_problems
from .schema import (
    AdapterSpec,
    CausalLmSpec,
    Costs,
    CostTerms,
    EmbeddingSpec,
    ExportSpec,
    InitSpec,
    LayersSpec,
    LinearSpec,
    OnnxSpec,
    ParitySpec,
    SiteRule,
    SliceSpec,
    Spec,
    TransformersSpec,
    TuneSpec,
)


def read_spec(path: Path) -> Spec:
    """Read and check a spec.

    Raises:
        SpecError: with every problem of the file, each with line, path, and a hint.
    """
    data, lines, problems = read_yaml(path, SPEC)
    problems += cross_problems(data, lines)
    try:
        spec = Spec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems += schema_problems(error.errors(), lines, _keys_beside)
    if problems:
        raise SpecError(str(path), problems)
    return spec


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors."""
    schema = Spec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _keys_beside(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the contract knows at the place of an unknown key."""
    models: list[type[BaseModel]] = [
        Spec,
        LayersSpec,
        TransformersSpec,
        CausalLmSpec,
        OnnxSpec,
        SiteRule,
        AdapterSpec,
        ExportSpec,
        TuneSpec,
        Costs,
        CostTerms,
        ParitySpec,
    ]
    models += [LinearSpec, EmbeddingSpec, SliceSpec, InitSpec]
    parents: dict[tuple[str, ...], list[type[BaseModel]]] = {
        (): [Spec],
        ("base",): [LayersSpec, TransformersSpec, CausalLmSpec, OnnxSpec],
        ("base", "sites"): [SiteRule],
        ("base", "init"): [InitSpec],
        ("base", "layers"): [LinearSpec, EmbeddingSpec],
        ("base", "layers", "slices"): [SliceSpec],
        ("adapters",): [AdapterSpec],
        ("export",): [ExportSpec],
        ("export", "tune"): [TuneSpec],
        ("export", "tune", "costs"): [Costs],
        ("export", "tune", "costs", "kernels"): [CostTerms],
        ("parity",): [ParitySpec],
    }
    parent = tuple(part for part in location[:-1] if isinstance(part, str))
    return [key for model in parents.get(parent, models) for key in model.model_fields]
