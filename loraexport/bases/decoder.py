"""`kind: causal_lm`: onnxruntime-genai's own graph of a decoder, with multi-LoRA grafted in."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from ..errors import BaseModelError
from ..hf.model import load_plain_model
from ..plan.plan import Plan
from .model import read_base
from .weights import Base

_PRECISIONS = {
    # For CUDA its float32 graph hides q, k and v inside an Attention, where nothing can be added.
    ("float", "float32"): ("fp32", "cpu"),
    ("float", "float16"): ("fp16", "cuda"),
    ("float", "bfloat16"): ("bf16", "cuda"),
    ("int4", "float32"): ("int4", "cpu"),
    ("int4", "float16"): ("int4", "cuda"),
}
"""The model builder's precision and execution provider, by the base's weights and the export's
dtype; its graphs run on the other provider too."""
_OPTIONS = ["accuracy_level=0"]
"""Of int4: the products take activations as they are, not rounded to int8."""


def load_base(plan: Plan) -> Base:
    """Read the weights of a planned decoder's sites.

    Raises:
        BaseModelError: the base cannot be used.
    """
    assert plan.generator is not None, "the plan is of a decoder"
    directory = plan.generator.directory
    layers = [one.layer for one in plan.layers]
    return read_base(load_plain_model(directory, "causal-lm", {}), layers)


def build_graph(plan: Plan, folder: Path) -> ir.Model:
    """onnxruntime-genai's graph of the base, read into memory; its other files lie in `folder`.

    Raises:
        BaseModelError: its model builder cannot take this model, and why.
    """
    assert plan.generator is not None, "the plan is of a decoder"
    assert plan.spec.base.kind == "causal_lm", "its graph is built, not read"
    try:
        with _no_logging():
            from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError as error:
        raise BaseModelError(
            "base.kind causal_lm needs onnxruntime-genai's model builder: pip install"
            " 'loraexport[genai]'"
        ) from error
    directory = plan.generator.directory
    precision = _PRECISIONS[plan.spec.base.weights, plan.spec.export.dtype]
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as cache:
        place = ("decoder", str(directory), str(folder), *precision)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _no_logging():
                prepared = parse_extra_options(*place, cache, _OPTIONS)
                create_model(*place, cache, **prepared)
        except Exception as error:
            raise BaseModelError(
                f"{directory}: onnxruntime-genai's model builder cannot take this model:"
                f" {type(error).__name__}: {str(error).strip() or said.getvalue()[-200:]}"
            ) from error
    graph = folder / "model.onnx"
    model = ir.load(graph)
    ir.external_data.load_to_model(model)
    for file in (graph, folder / "model.onnx.data"):
        file.unlink(missing_ok=True)
    return model


@contextlib.contextmanager
def _no_logging() -> Iterator[None]:
    """Keep the builder's messages off the screen, and its settings off the root logger."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)
        root.handlers[:] = handlers
