"""A Hugging Face decoder in float64, of which one layer at a time is: its weights stay as stored.

Texts go through a layer side by side, each by itself and with its own adapter, before the next
layer is widened. What the model does around its layers is its own code, run with stand-ins that
note what every layer is called with, and give it what the layers have made of that.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraexport_runtime.checking.model import Mix

from ...errors import BaseModelError
from ..model.plain_model import merged_into
from ..oracle import ReferenceAdapter

_BLOCK = 2**14
"""Rows of the output layer that are float64 at a time."""


@dataclass
class Reading:
    """New tokens of one text, and the keys and values of those before them."""

    mix: Mix
    tokens: Sequence[int]
    keep: int
    """Of so many of the last tokens the logits are wanted."""
    cache: Any = None
    """transformers' own; None: the text begins here, and nothing follows."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """What every layer is called with beside the hidden states."""
    hidden: Tensor | None = None


class StreamedDecoder:
    """logits of texts, layer by layer."""

    def __init__(
        self,
        model: Any,
        adapters: Mapping[int, ReferenceAdapter],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """
        Args:
            model: its weights in any dtype of floats.
            adapters: by slot, to be merged into what they apply to.
            dtype: of what is computed.
        """
        self._dtype = dtype
        self.config = model.config
        self._model = model
        self._adapters = adapters
        self._core = model.get_decoder()
        count = int(self.config.num_hidden_layers)
        names = [
            name
            for name, module in self._core.named_children()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if len(names) != 1:
            raise BaseModelError(
                f"a model of type {self.config.model_type!r} has no list of {count} layers, so it"
                " cannot be read layer by layer"
            )
        self._name = names[0]
        self._layers: Any = getattr(self._core, self._name)
        self._output: Any = model.get_output_embeddings()
        streamed = (self._layers, model.get_input_embeddings(), self._output)
        apart = {id(parameter) for module in streamed for parameter in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in apart:  # the last norm
                parameter.data = parameter.data.to(dtype)
        self._paths = {id(module): name for name, module in model.named_modules()}

    def run(self, readings: Sequence[Reading]) -> list[np.ndarray]:
        """The logits [keep, vocabulary] of every reading."""
        with torch.no_grad():
            for mix in dict.fromkeys(reading.mix for reading in readings):
                with self._embedding_of(mix):
                    for reading in readings:
                        if reading.mix == mix:
                            self._begin(reading)
            for index, layer in enumerate(self._layers):
                with _widened(layer, self._dtype):
                    for mix in dict.fromkeys(reading.mix for reading in readings):
                        with merged_into(self._model, self._within(mix, layer), mix):
                            for reading in readings:
                                if reading.mix == mix:
                                    _pass(layer, reading, index)
            logits: list[np.ndarray] = [np.empty(0)] * len(readings)
            for mix in dict.fromkeys(reading.mix for reading in readings):
                with self._output_of(mix):
                    for index, reading in enumerate(readings):
                        if reading.mix == mix:
                            logits[index] = self._end(reading)
        return logits

    def _begin(self, reading: Reading) -> None:
        """Embed the tokens, and note what the layers are called with."""

        def note(_: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            reading.calls.append((args, kwargs))
            if reading.hidden is None:
                reading.hidden = hidden
            return hidden

        reading.calls, reading.hidden = [], None
        with self._stand_ins(note):
            self._core(
                inputs_embeds=self._embed(reading.tokens),
                past_key_values=reading.cache,
                use_cache=reading.cache is not None,
            )

    def _end(self, reading: Reading) -> np.ndarray:
        assert reading.hidden is not None, "the layers have run"
        last = reading.hidden[:, -reading.keep :]
        reading.hidden, reading.calls = None, []

        def give(stand_in: nn.Module, *_: Any, **__: Any) -> Tensor:
            return last

        with self._stand_ins(give):
            outputs = self._model(inputs_embeds=torch.zeros_like(last), use_cache=False)
        logits: np.ndarray = outputs.logits[0].numpy()
        return logits

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """[1, n, size] of the module's own forward, over the rows that are asked for alone."""
        module: Any = self._model.get_input_embeddings()
        if not isinstance(module, nn.Embedding):  # PEFT's, around one
            with _widened(module, self._dtype):
                around: Tensor = module(torch.tensor([list(tokens)]))
            return around
        rows, places = np.unique(np.array(tokens), return_inverse=True)
        weight, padding = module.weight, module.padding_idx
        module.weight = nn.Parameter(
            weight[torch.from_numpy(rows)].to(self._dtype), requires_grad=False
        )
        module.padding_idx = None
        try:
            embedded: Tensor = module(torch.from_numpy(places)[None])
        finally:
            module.weight, module.padding_idx = weight, padding
        return embedded

    def _within(self, mix: Mix, module: nn.Module) -> dict[int, ReferenceAdapter]:
        """The adapters of a mix, with what they have inside a module alone."""
        path = self._paths[id(module)]

        def inside(sites: Mapping[str, Any]) -> dict[str, Any]:
            return {
                site: value for site, value in sites.items() if f"{site}.".startswith(f"{path}.")
            }

        every = {slot: self._adapters[slot] for slot, _ in mix}
        return {
            slot: replace(
                adapter,
                sites=inside(adapter.sites),
                extras=inside(adapter.extras),
                heads=inside(adapter.heads),
            )
            for slot, adapter in every.items()
        }

    @contextmanager
    def _stand_ins(self, forward: Any) -> Iterator[None]:
        stand_ins = [_StandIn(layer, forward) for layer in self._layers]
        setattr(self._core, self._name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self._core, self._name, self._layers)

    @contextmanager
    def _embedding_of(self, mix: Mix) -> Iterator[None]:
        """The table of the tokens with a mix: whole, where an adapter of it has a change there."""
        module = self._model.get_input_embeddings()
        adapters = self._within(mix, module)
        if any(adapter.sites or adapter.heads for adapter in adapters.values()):
            with _widened(module, self._dtype), merged_into(self._model, adapters, mix):
                yield
        else:
            yield

    @contextmanager
    def _output_of(self, mix: Mix) -> Iterator[None]:
        """The output layer with a mix, some of its rows at a time where it is a plain one."""
        if type(self._output) is not nn.Linear:
            with _widened(self._output, self._dtype):
                yield
            return
        path = self._paths[id(self._output)]
        blocks = _Blocks(self._output, path, self._within(mix, self._output), mix, self._dtype)
        self._model.set_output_embeddings(blocks)
        try:
            yield
        finally:
            self._model.set_output_embeddings(self._output)


class _StandIn(nn.Module):
    """In a layer's place, with its attributes."""

    def __init__(self, layer: nn.Module, forward: Any) -> None:
        super().__init__()
        self.__dict__["_layer"], self.__dict__["_forward"] = layer, forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As it was told."""
        given: Tensor = self.__dict__["_forward"](self, *args, **kwargs)
        return given


class _Blocks(nn.Module):
    """y = x W'^T + b', W' made some rows at a time."""

    def __init__(
        self,
        output: Any,
        path: str,
        adapters: Mapping[int, ReferenceAdapter],
        mix: Mix,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._dtype = dtype
        self.__dict__["_output"] = output  # whose weight may be the embedding's
        self._path, self._adapters, self._mix = path, adapters, mix

    def forward(self, x: Tensor) -> Tensor:
        """[1, n, in] -> [1, n, out]"""
        output = self.__dict__["_output"]
        parts = []
        for start in range(0, len(output.weight), _BLOCK):
            rows = slice(start, start + _BLOCK)
            linear = nn.Linear(1, 1, bias=output.bias is not None)
            linear.weight = nn.Parameter(output.weight[rows].to(self._dtype), requires_grad=False)
            if output.bias is not None:
                linear.bias = nn.Parameter(output.bias[rows].to(self._dtype), requires_grad=False)
            holder = _Holder(self._path, linear)
            adapters = {slot: adapter.rows(rows) for slot, adapter in self._adapters.items()}
            with merged_into(holder, adapters, self._mix):
                parts.append(linear(x))
        return torch.cat(parts, dim=-1)


class _Holder:
    """What `merged_into` takes for a model: one module under its name."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._modules = {path: module}

    def get_submodule(self, path: str) -> nn.Module:
        """The module of a name."""
        return self._modules[path]


@contextmanager
def _widened(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """All parameters of a module in a dtype, until the end of the block."""
    stored = [(parameter, parameter.data) for parameter in module.parameters()]
    for parameter, values in stored:
        parameter.data = values.to(dtype)
    try:
        yield
    finally:
        for parameter, values in stored:
            parameter.data = values


def _pass(layer: nn.Module, reading: Reading, index: int) -> None:
    args, kwargs = reading.calls[index]
    made = layer(reading.hidden, *args, **kwargs)
    reading.hidden = made[0] if isinstance(made, tuple) else made
