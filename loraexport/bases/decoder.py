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
from functools import partial
from pathlib import Path

import onnx_ir as ir

from loraexport_runtime.adapters.dora import dora_sites, output_scales
from loraexport_runtime.adapters.tensors import read_site_weights
from loraexport_runtime.contract.genai_config import GENAI_CONFIG, read_genai_config
from loraexport_runtime.contract.manifest import Strategy

from ..errors import BaseModelError
from ..graphs.files import other_files, read_graph
from ..graphs.products import Graft, find_grafts
from ..hf.model import load_stored_decoder
from ..hf.positions import Positions, link_plain, read_positions, read_rotary_factors
from ..hf.tokenizer import drop_code
from ..plan.decoder import DecoderPlan
from ..plan.plan import Plan
from ..plan.stacks import make_stacks
from . import graph as onnx_graph
from .adapters import OutputScales
from .attention import (
    RotaryTables,
    choose_by_row,
    graph_positions,
    keep_whole_caches,
    set_factors,
    set_layers,
)
from .model import digest_base, stored_weight
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
_OPTIONS = ["accuracy_level=0", "windowed_kv_cache=false"]
"""Of int4: the products take activations as they are, not rounded to int8. Of layers with a window:
a cache of full length, as every session but onnxruntime-genai's own needs it."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class GenaiGraph:
    """A decoder's graph in memory, and the other files of onnxruntime-genai's folder."""

    model: ir.Model
    files: Mapping[str, Path | bytes]
    """By name: where the file lies, or what it holds."""
    positions: Positions

    def write_files(self, folder: Path) -> None:
        """Put all but the graph into a folder."""
        folder.mkdir(exist_ok=True)
        for name, content in self.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content)
        drop_code(folder)


def load_decoder_base(plan: Plan[DecoderPlan]) -> tuple[Base, OutputScales]:
    """The digests of a planned decoder's weights, which are in its graph alone, and what DoRA takes
    of them.

    Raises:
        BaseModelError: the base cannot be used.
        WeightsError: an adapter holds NaN or Inf, or its DoRA no direction.
    """
    decoder = plan.kind
    if decoder.graph is not None:
        return onnx_graph.load_graph_base(plan, decoder.graph), {}
    layers = [planned.layer for planned in plan.layers]
    model = load_stored_decoder(decoder.directory)
    scales = {}
    for adapter in plan.adapters:
        if "dora" in adapter.header.features:
            dora = dora_sites(read_site_weights(adapter.header, adapter.modules))
            weight_of = partial(stored_weight, model)
            scales[adapter.name] = output_scales(dora, weight_of, layers, adapter.scale)
    return digest_base(model, layers, decoder.missing), scales


def load_decoder_graph(plan: Plan[DecoderPlan]) -> GenaiGraph:
    """The base's graph: the one that exists, or the one that the model builder makes.

    Raises:
        BaseModelError: it cannot be read, or the builder cannot take this model, and why.
    """
    graph = plan.kind.graph
    if graph is None:
        return _build_graph(plan)
    others = other_files(read_graph(graph.file), graph.file, graph.directory)
    files = {file.name: file for file in others}
    model = onnx_graph.load_graph(graph)
    positions = graph_positions(model)
    config = read_genai_config(graph.directory, BaseModelError)["model"]
    window = config["decoder"].get("sliding_window", {}).get("window_size")
    if window and not any(positions.windows):
        raise BaseModelError(
            f"{graph.directory / GENAI_CONFIG}: it has a sliding window of {window} tokens, and no"
            f" layer of {graph.file.name} has one, as onnxruntime-genai's builder leaves it out:"
            " longer texts would be computed without it. Build the Hugging Face model instead"
            " (base.kind: causal_lm)"
        )
    keep_whole_caches(model)
    choose_by_row(model, int(config["decoder"]["head_size"]))
    return GenaiGraph(model, files, positions)


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
    stacks = make_stacks(layer, strategy, num_slots, widths)
    return replace(graft, layer=replace(layer, strategy=strategy, stacks=stacks))


def _is_plain(node: ir.Node) -> bool:
    weight = node.inputs[1]
    if node.op_type != "MatMul" or weight is None or weight.const_value is None:
        return False
    return weight.const_value.dtype in _FLOATS


def _build_graph(plan: Plan[DecoderPlan]) -> GenaiGraph:
    directory = plan.kind.directory
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as folder:
        link_plain(directory, Path(plain))
        _run_builder(plan, Path(plain), Path(folder))
        model = ir.load(Path(folder) / "model.onnx")
        ir.external_data.load_to_model(model)
        graphs = ("model.onnx", "model.onnx.data")
        files = [
            file
            for file in sorted(Path(folder).iterdir())
            if file.is_file() and file.name not in graphs
        ]
        contents = {file.name: file.read_bytes() for file in files}
        config = read_genai_config(Path(folder), BaseModelError)["model"]
    positions = read_positions(directory)
    set_layers(model, positions)
    tables = _read_tables(directory, positions, int(config["context_length"]))
    if tables is not None:
        set_factors(model, tables, int(config["decoder"]["head_size"]))
    return GenaiGraph(model, contents, positions)


def _read_tables(directory: Path, positions: Positions, context: int) -> RotaryTables | None:
    length = positions.reread_length
    factors = read_rotary_factors(directory, context)
    if factors is None or length is None or length >= context:
        return None if factors is None else RotaryTables(factors, None)
    short = read_rotary_factors(directory, length)
    assert short is not None, "a model has RoPE at every length, or at none"
    return RotaryTables(short, factors)


def _run_builder(plan: Plan[DecoderPlan], directory: Path, folder: Path) -> None:
    """onnxruntime-genai's model builder: a directory of Hugging Face -> its folder."""
    base = plan.spec.base
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
    with tempfile.TemporaryDirectory() as cache:
        place = ("decoder", str(directory), str(folder), *precision)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _no_logging():
                prepared = parse_extra_options(*place, cache, _OPTIONS)
                create_model(*place, cache, **prepared)
        except Exception as error:
            raise BaseModelError(
                f"{plan.kind.directory}: onnxruntime-genai's model builder cannot take this model:"
                f" {type(error).__name__}: {str(error).strip() or said.getvalue()[-200:]}"
            ) from error


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
