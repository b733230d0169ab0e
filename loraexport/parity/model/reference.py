"""What a whole model should give: the plain Hugging Face model in float64, adapters merged in.

Of an ONNX graph there is no such model (see graph_reference).

At every site W' = W + sum_i w_i (W_i - W), W_i by the oracle's own reading of adapter i; a row of
one adapter has w = 1. So a blend is base + sum_i w_i (y_i - base) at each site.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import save

from loraexport_runtime.checking.model import (
    BASE,
    Inputs,
    Mix,
    ModelReference,
    Outputs,
    RowCase,
    kept_tokens,
    make_cases,
)
from loraexport_runtime.checking.stored import CASES_FILE
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import Manifest

from ...errors import BaseModelError
from .cases import Contents, make_inputs


class ReferenceModel(Protocol):
    """A whole model that runs a batch with one mix of adapters, or none."""

    source: str
    """How a report speaks of it."""
    label: str
    """How an error speaks of it."""
    contents: Contents

    def run(self, inputs: Inputs, mix: Mix) -> Outputs:
        """The outputs for a batch, all of whose rows use `mix`."""


def make_reference(
    plain: ReferenceModel, manifest: Manifest, model: Model, seed: int
) -> ModelReference:
    """Run a model once for each adapter or blend of each case."""
    inputs, expected, base_expected = {}, {}, {}
    for case in make_cases(manifest, model):
        values = make_inputs(case, model.inputs, plain.contents, seed)
        base = plain.run(values, BASE)
        _require_finite(base, values, case, plain.label, model)
        whole = {name: y.copy() for name, y in base.items()}
        for mix in set(case.rows) - {BASE}:
            rows = np.array([row == mix for row in case.rows])
            for name, y in plain.run(values, mix).items():
                whole[name][rows] = y[rows]
        inputs[case.name], base_expected[case.name] = values, base
        expected[case.name] = whole
    return ModelReference(plain.source, inputs, expected, base_expected)


def _require_finite(base: Outputs, inputs: Inputs, case: RowCase, label: str, model: Model) -> None:
    for entry in model.outputs:
        keep = kept_tokens(inputs, entry)
        if not np.isfinite(base[entry.name][keep]).all():
            data = "padded texts" if "input_ids" in inputs else next(iter(inputs))
            raise BaseModelError(
                f"{label} gives NaN or Inf for {data}, in {base[entry.name].dtype} and without"
                f" adapters (case {case.name!r}), so there is nothing to compare its graphs with"
            )


def save_reference(reference: ModelReference, folder: Path) -> None:
    """Keep inputs and expected outputs (as float32) in the artifact."""
    arrays: dict[str, np.ndarray] = {}
    for case, inputs in reference.inputs.items():
        arrays |= {f"{case}/x/{name}": value for name, value in inputs.items()}
        for part, every in (("y", reference.expected), ("base", reference.base_expected)):
            # In C's order: safetensors writes the memory as it lies.
            arrays |= {
                f"{case}/{part}/{name}": y.astype(np.float32, order="C")
                for name, y in every[case].items()
            }
    (folder / CASES_FILE).parent.mkdir(exist_ok=True)
    (folder / CASES_FILE).write_bytes(save(arrays))
