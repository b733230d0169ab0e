"""Decoders that a reference is made with: one prompt at a time, one adapter or none."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from loraexport_runtime.checking.decoder import STEPS
from loraexport_runtime.checking.decoder_steps import empty_cache
from loraexport_runtime.checking.model import Mix
from loraexport_runtime.contract.manifest import Manifest

from ...bases.decoder import find_decoder_sites, plain_directory
from ...hf.model import load_plain_model
from ...plan.decoder import DecoderPlan
from ...plan.plan import Plan
from ..model.graph_model import GRAPH_SOURCE, GraphModel
from ..model.plain_model import merged_into
from ..oracle import ReferenceAdapter, read_adapters
from .reference import ReferenceDecoder, read_logits


def open_decoder(
    plan: Plan[DecoderPlan],
    folder: Path,
    manifest: Manifest,
    config: Mapping[str, Any],
    graph: Callable[[], ir.Model],
) -> ReferenceDecoder:
    """The float64 model where the base has one, else the base's graph with the LoRA added.

    Args:
        config: onnxruntime-genai's.
        graph: makes the base's graph, which is changed.
    """
    adapters = read_adapters(folder, manifest)
    directory = plain_directory(plan)
    if isinstance(directory, Path):
        return PlainDecoder(directory, adapters)
    base = graph()
    made = GraphModel(base, find_decoder_sites(plan, base), adapters)
    return GraphDecoder(made, empty_cache(config, 1, manifest.dtype))


class PlainDecoder:
    """The Hugging Face model in float64, adapters merged into its weights."""

    source = "the float64 model, merged"

    def __init__(self, directory: Path, adapters: Mapping[int, ReferenceAdapter]) -> None:
        self._model: Any = load_plain_model(directory, "causal-lm", {}).to(torch.float64)
        self._adapters = adapters

    @contextmanager
    def using(self, mix: Mix) -> Iterator[None]:
        """See ReferenceDecoder."""
        with merged_into(self._model, self._adapters, mix):
            yield

    def greedy(self, prompt: Sequence[int]) -> np.ndarray:
        """See ReferenceDecoder."""
        ids, cache, tokens = torch.tensor([list(prompt)]), None, []
        with torch.no_grad():
            for _ in range(STEPS):
                found = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = found.past_key_values
                tokens.append(int(found.logits[0, -1].argmax()))
                ids = torch.tensor([tokens[-1:]])
        return np.array(tokens)

    def logits(self, prompt: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """See ReferenceDecoder."""
        return read_logits(self._model, prompt, tokens)


class GraphDecoder:
    """The base's own graph, without a cache: every step reads the whole text again."""

    source = GRAPH_SOURCE

    def __init__(self, graph: GraphModel, empty: np.ndarray) -> None:
        """`empty`: keys or values of no tokens, for one prompt."""
        self._graph = graph
        taken = [one.name for one in graph.session.get_inputs()]
        self._cache = {name: empty for name in taken if name.startswith("past_key_values.")}
        self._takes_positions = "position_ids" in taken
        self._feeds = graph.feeds(0)

    @contextmanager
    def using(self, mix: Mix) -> Iterator[None]:
        """See ReferenceDecoder."""
        self._feeds = self._graph.feeds(mix[0][0] if mix else 0)
        try:
            yield
        finally:
            self._feeds = self._graph.feeds(0)

    def greedy(self, prompt: Sequence[int]) -> np.ndarray:
        """See ReferenceDecoder."""
        tokens: list[int] = []
        for _ in range(STEPS):
            tokens.append(int(self._run([*prompt, *tokens])[-1].argmax()))
        return np.array(tokens)

    def logits(self, prompt: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """See ReferenceDecoder."""
        return self._run([*prompt, *tokens[:-1].tolist()])[len(prompt) - 1 :]

    def _run(self, text: Sequence[int]) -> np.ndarray:
        """The logits [n, vocabulary] of a text."""
        ids = np.array([text])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if self._takes_positions:
            feeds["position_ids"] = np.arange(ids.shape[1])[None]
        found = self._graph.session.run(["logits"], {**feeds, **self._cache, **self._feeds})[0]
        logits: np.ndarray = found[0].astype(np.float64)
        return logits
