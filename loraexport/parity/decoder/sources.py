"""Decoders that a reference is made with: one prompt at a time, one adapter or none."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn
from transformers import DynamicCache

from loraexport_runtime.checking.decoder_cases import STEPS
from loraexport_runtime.checking.decoder_steps import empty_cache
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.rope import tokens_until_reread

from ...bases.decoder import find_decoder_sites, plain_directory
from ...hf.model import load_stored_decoder
from ...plan.decoder import DecoderPlan
from ...plan.plan import Plan
from ..model.graph_model import GRAPH_SOURCE, Changes, GraphModel
from ..oracle import ReferenceAdapter, read_adapters
from .reference import ReferenceDecoder, Text, parts_read
from .streamed import Reading, StreamedDecoder


def open_decoder(
    plan: Plan[DecoderPlan],
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    config: Mapping[str, Any],
    graph: Callable[[], ir.Model],
) -> ReferenceDecoder:
    """The float64 model where the base has one, else the base's graph with the LoRA added.

    Args:
        config: onnxruntime-genai's.
        graph: makes the base's graph, which is changed.
    """
    adapters, reread_length = read_adapters(folder, manifest), decoder.reread_length
    directory = plain_directory(plan)
    if isinstance(directory, Path):
        return PlainDecoder(directory, adapters, reread_length)
    base = graph()
    changes = _read_changes(plan.kind.directory, adapters)
    graph_model = GraphModel(base, find_decoder_sites(plan, base), adapters, changes)
    return GraphDecoder(graph_model, empty_cache(config, 1, manifest.dtype), reread_length)


def _read_changes(directory: Path, adapters: Mapping[int, ReferenceAdapter]) -> Changes:
    """Of adapters with DoRA or biases, by the weights that they were trained on."""
    if not any(adapter.extras for adapter in adapters.values()):
        return {}
    model = load_stored_decoder(directory)
    changes: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for slot, adapter in adapters.items():
        for site in adapter.extras:
            module: Any = model.get_submodule(site)
            weight = module.weight.detach().double().numpy()
            weight = weight.T if isinstance(module, nn.Embedding) else weight
            bias = getattr(module, "bias", None)
            own = None if bias is None else bias.detach().double().numpy()
            merged = adapter.merge_bias(site, own)
            shift = (
                np.zeros(len(weight)) if merged is None else merged - (0 if own is None else own)
            )
            pair = adapter.output_scale(site, weight), shift
            changes.setdefault(slot, {})[site] = pair
    return changes


class PlainDecoder:
    """The Hugging Face model in float64, adapters merged into its weights, layer by layer."""

    source = "the float64 model, merged"

    def __init__(
        self, directory: Path, adapters: Mapping[int, ReferenceAdapter], reread_length: int | None
    ) -> None:
        self._model = StreamedDecoder(load_stored_decoder(directory), adapters)
        self._reread_length = reread_length

    def greedy(self, texts: Sequence[Text]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See ReferenceDecoder."""
        tokens: list[list[int]] = [[] for _ in texts]
        logits: list[list[np.ndarray]] = [[] for _ in texts]
        caches: list[Any] = [None] * len(texts)
        for step in range(STEPS):
            readings = []
            for row, text in enumerate(texts):
                new = tokens[row][-1:]
                length = len(text.prompt) + step
                begins = tokens_until_reread(length - 1, self._reread_length) == 1
                if step == 0 or begins:
                    caches[row] = DynamicCache(config=self._model.config)
                    new = [*text.prompt, *tokens[row]]
                readings.append(Reading(text.mix, new, 1, caches[row]))
            for row, values in enumerate(self._model.run(readings)):
                logits[row].append(values[0])
                tokens[row].append(int(values[0].argmax()))
        return [
            (np.array(row_tokens), np.stack(row_logits))
            for row_tokens, row_logits in zip(tokens, logits, strict=True)
        ]

    def logits(self, texts: Sequence[Text], tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See ReferenceDecoder."""
        readings, rows = [], []
        for row, (text, row_tokens) in enumerate(zip(texts, tokens, strict=True)):
            for count, keep in parts_read(len(text.prompt), self._reread_length):
                read = [*text.prompt, *row_tokens[: count - 1].tolist()]
                readings.append(Reading(text.mix, read, keep))
                rows.append(row)
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for row, values in zip(rows, self._model.run(readings), strict=True):
            parts[row].append(values)
        return [np.concatenate(row_parts) for row_parts in parts]


class GraphDecoder:
    """The base's own graph, without a cache where logits are compared."""

    source = GRAPH_SOURCE

    def __init__(self, graph: GraphModel, empty: np.ndarray, reread_length: int | None) -> None:
        """`empty`: keys or values of no tokens, for one prompt."""
        self._graph = graph
        names = [entry.name for entry in graph.session.get_inputs()]
        past = [name for name in names if name.startswith("past_key_values.")]
        self._empty = dict.fromkeys(past, empty)
        self._takes_positions = "position_ids" in names
        self._reread_length = reread_length

    def greedy(self, texts: Sequence[Text]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See ReferenceDecoder. The tokens are found with a cache, or a long text would be read
        again for each."""
        every = []
        for text in texts:
            feeds = self._feeds(text)
            tokens: list[int] = []
            for count, new in parts_read(len(text.prompt), self._reread_length):
                read, cache = [*text.prompt, *tokens], self._empty
                for _ in range(new):
                    logits, cache = self._run(read, cache, feeds)
                    tokens.append(int(logits[-1].argmax()))
                    read = tokens[-1:]
                assert len(tokens) == count, "each part gives its tokens"
            every.append(np.array(tokens))
        return list(zip(every, self.logits(texts, every), strict=True))

    def logits(self, texts: Sequence[Text], tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See ReferenceDecoder."""
        every = []
        for text, row_tokens in zip(texts, tokens, strict=True):
            parts = []
            for count, keep in parts_read(len(text.prompt), self._reread_length):
                read = [*text.prompt, *row_tokens[: count - 1].tolist()]
                parts.append(self._run(read, self._empty, self._feeds(text))[0][-keep:])
            every.append(np.concatenate(parts).astype(np.float64))
        return every

    def _feeds(self, text: Text) -> dict[str, np.ndarray]:
        return self._graph.feeds(text.mix)

    def _run(
        self,
        tokens: Sequence[int],
        cache: Mapping[str, np.ndarray],
        feeds: Mapping[str, np.ndarray],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The logits [n, vocabulary] of a text's next tokens, and its cache with them."""
        ids = np.array([tokens])
        past = next(iter(cache.values())).shape[2]
        total = past + ids.shape[1]
        inputs = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64)}
        if self._takes_positions:
            inputs["position_ids"] = np.arange(past, total)[None]
        present = [name.replace("past_key_values.", "present.") for name in cache]
        outputs = self._graph.session.run(["logits", *present], {**inputs, **cache, **feeds})
        return outputs[0][0], dict(zip(cache, outputs[1:], strict=True))
