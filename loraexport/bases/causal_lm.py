"""`kind: causal_lm`: onnxruntime-genai's own graph of a decoder, with multi-LoRA grafted in."""

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import transformers

from loraexport_runtime.devices import NUMPY_DTYPES
from loraexport_runtime.manifest import Layer
from loraexport_runtime.stacks import assemble, pack

from ..errors import BaseModelError
from ..plan import Plan
from .layers import Base, load_adapters
from .plain import load_plain_model
from .transformers import read_base

FOLDER = "generator"
_PRECISIONS = {
    # For CUDA its float32 graph hides q, k and v inside an Attention, where nothing can be added.
    "float32": ("fp32", "cpu"),
    "float16": ("fp16", "cuda"),
    "bfloat16": ("bf16", "cuda"),
}
"""The model builder's precision and execution provider; its graphs run on the other one too."""


@dataclass(frozen=True)
class DecoderModules:
    """A decoder's stacks, and the token that pads its prompts."""

    layers: tuple[Layer, ...]
    stacks: dict[str, np.ndarray] = field(repr=False)
    pad_token_id: int


def load_decoder(plan: Plan) -> tuple[Base, DecoderModules]:
    """Read the base's sites and the adapters of a planned decoder.

    Raises:
        BaseModelError: the base cannot be used.
        WeightsError, AdapterWeightsError: an adapter cannot be used on it.
    """
    assert plan.generator is not None, "the plan is of a decoder"
    directory = plan.generator.directory
    if not (directory / "tokenizer.json").is_file():
        raise BaseModelError(
            f"{directory}: no tokenizer.json, which onnxruntime-genai needs; save the model's"
            " tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
        )
    layers = [one.layer for one in plan.layers]
    base = read_base(load_plain_model(directory, "causal-lm", {}), layers)
    adapters = load_adapters(plan, base)
    dtype = NUMPY_DTYPES[plan.spec.export.dtype]
    stacks: dict[str, np.ndarray] = {}
    for layer in layers:
        blocks = {
            one.slot: pack(layer, adapters[one.name], one.scale, dtype)
            for one in plan.adapters
            if one.slot is not None
        }
        stacks |= {stack.name: assemble(stack, dtype, None, blocks) for stack in layer.stacks}
    return base, DecoderModules(tuple(layers), stacks, _choose_pad(directory))


def build_base(plan: Plan, modules: DecoderModules, folder: Path) -> ir.Model:
    """onnxruntime-genai's graph of the base, read into memory; its other files lie in `folder`.

    Raises:
        BaseModelError: its model builder cannot take this model, and why.
    """
    assert plan.generator is not None, "the plan is of a decoder"
    try:
        with _no_logging():
            from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError as error:
        raise BaseModelError(
            "base.kind causal_lm needs onnxruntime-genai's model builder: pip install"
            " 'loraexport[genai]'"
        ) from error
    directory = plan.generator.directory
    dtype = plan.spec.export.dtype
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as cache:
        place = ("decoder", str(directory), str(folder), *_PRECISIONS[dtype])
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _no_logging():
                prepared = parse_extra_options(*place, cache, [])
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
    _adapt_config(folder / "genai_config.json", modules.pad_token_id)
    return model


def _adapt_config(config: Path, pad: int) -> None:
    """Our padding; and no warning for every stack that it can be overridden, which is wanted."""
    data: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    data["model"]["pad_token_id"] = pad
    data["model"]["decoder"]["session_options"]["log_severity_level"] = 3
    config.write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")


def _choose_pad(directory: Path) -> int:
    """A token that no prompt holds: onnxruntime-genai takes it for padding wherever it stands.

    The tokenizer's own, unless it also ends or starts a text; else an added token that its chat
    template does not write; at last the highest id.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    eos = config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos]) | {config.bos_token_id}
    pad = config.pad_token_id
    if isinstance(pad, int) and pad >= 0 and pad not in ends:
        return pad
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    template = str(tokenizer.chat_template or "")
    for index, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        text = str(token)
        known = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        if index not in ends | known and text not in template and index < config.vocab_size:
            return int(index)
    return int(config.vocab_size) - 1


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
