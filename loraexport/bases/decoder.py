"""A decoder that generates: its weights, and the graph that multi-LoRA is grafted into.

The graph exists, or onnxruntime-genai's model builder makes it.
"""

import contextlib
import io
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from loraexport_runtime.contract.manifest import Strategy

from ..errors import BaseModelError
from ..graphs.products import Graft, find_grafts
from ..hf.model import load_plain_model
from ..plan.decoder import DecoderPlan
from ..plan.plan import Plan
from ..plan.stacks import make_stacks
from . import graph as onnx_graph
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
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class GenaiGraph:
    """A decoder's graph in memory, and the other files of onnxruntime-genai's folder."""

    model: ir.Model
    files: Mapping[str, Path | bytes]
    """By name: where the file lies, or what it holds."""

    def write_files(self, folder: Path) -> None:
        """Put all but the graph into a folder."""
        folder.mkdir(exist_ok=True)
        for name, content in self.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content)


def load_decoder_base(plan: Plan[DecoderPlan]) -> Base:
    """Read the weights of a planned decoder's sites, or of a graph that exists their digests.

    Raises:
        BaseModelError: the base cannot be used.
    """
    decoder = plan.kind
    if decoder.graph is not None:
        return onnx_graph.load_graph_base(plan, decoder.graph)
    layers = [planned.layer for planned in plan.layers]
    return read_base(load_plain_model(decoder.directory, "causal-lm", {}), layers)


def load_decoder_graph(plan: Plan[DecoderPlan]) -> GenaiGraph:
    """The base's graph: the one that exists, or the one that the model builder makes.

    Raises:
        BaseModelError: it cannot be read, or the builder cannot take this model, and why.
    """
    graph = plan.kind.graph
    if graph is None:
        return _build_graph(plan)
    files = {file.name: file for file in onnx_graph.other_files(graph)}
    return GenaiGraph(onnx_graph.load_graph(graph), files)


def find_decoder_sites(plan: Plan[DecoderPlan], model: ir.Model) -> list[Graft]:
    """Where the plan's layers are in the base's graph.

    Raises:
        BaseModelError: a site is not there.
    """
    if plan.kind.graph is not None:
        return onnx_graph.find_sites(plan, plan.kind.graph, model, {})
    grafts = find_grafts(model.graph, [planned.layer for planned in plan.layers])
    return [fit_stacks(graft, plan.num_slots) for graft in grafts]


def plain_directory(plan: Plan[DecoderPlan]) -> Path | str:
    """The Hugging Face model whose numbers the graph has, or why there is none."""
    if plan.kind.graph is not None:
        return onnx_graph.NO_PLAIN_MODEL
    if plan.spec.base.kind == "causal_lm" and plan.spec.base.weights == "int4":
        return "its base has float weights, the graph's are int4"
    return plan.kind.directory


def fit_stacks(graft: Graft, num_slots: int) -> Graft:
    """The graft with the stacks that its products allow, where the plan has augmented: W is in
    them if each is a MatMul with a float weight, and else masked is the nearest form."""
    layer = graft.layer
    if layer.strategy != "augmented":
        return graft
    strategy: Strategy = "augmented" if all(map(_is_plain, graft.nodes)) else "masked"
    widths = graft.widths if strategy == "augmented" else [layer.out_features]
    slot_rows = layer.stacks[0].slot_rows
    stacks = make_stacks(layer, strategy, num_slots, widths, slot_rows=slot_rows)
    return replace(graft, layer=replace(layer, strategy=strategy, stacks=stacks))


def _is_plain(node: ir.Node) -> bool:
    weight = node.inputs[1]
    if node.op_type != "MatMul" or weight is None or weight.const_value is None:
        return False
    return weight.const_value.dtype in _FLOATS


def _build_graph(plan: Plan[DecoderPlan]) -> GenaiGraph:
    base, directory = plan.spec.base, plan.kind.directory
    try:
        with _no_logging():
            from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError as error:
        raise BaseModelError(
            "base.kind causal_lm needs onnxruntime-genai's model builder: pip install"
            " 'loraexport[genai]'"
        ) from error
    weights = base.weights if base.kind == "causal_lm" else "float"
    precision = _PRECISIONS[weights, plan.spec.export.dtype]
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as made:
        place = ("decoder", str(directory), made, *precision)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _no_logging():
                prepared = parse_extra_options(*place, cache, _OPTIONS)
                create_model(*place, cache, **prepared)
        except Exception as error:
            raise BaseModelError(
                f"{directory}: onnxruntime-genai's model builder cannot take this model:"
                f" {type(error).__name__}: {str(error).strip() or said.getvalue()[-200:]}"
            ) from error
        model = ir.load(Path(made) / "model.onnx")
        ir.external_data.load_to_model(model)
        graphs = ("model.onnx", "model.onnx.data")
        rest = [file for file in sorted(Path(made).iterdir()) if file.name not in graphs]
        return GenaiGraph(model, {file.name: file.read_bytes() for file in rest})


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
