"""A decoder's session and its rows: prompts are read, steps are made, logits are looked at."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...adapters.packing import lowest
from ...contract.genai_config import read_genai_config
from ...device import providers as devices
from ...device.captures import capturing, using
from ...device.dtypes import NUMPY_DTYPES
from ...device.kernels import STOCK, KernelChoice
from ...device.ort_session import open_session
from ...errors import ProviderError
from ...slots.lease import RowUse
from ..sampling import likeliest
from .cache import Cache
from .decoder_graph import DecoderGraph, read_decoder_graph
from .files import StepFiles
from .host_logits import HostLogits, likeliest_tokens
from .prompts import PromptGraphs, read_prompts
from .sizes import choose_sizes
from .step import RowInputs, Step
from .top_tokens import RowLogits, TopTokens

_LOG = logging.getLogger(__name__)
_BOUND = 64
"""So many selections of rows keep their bindings."""


@dataclass(frozen=True)
class PromptRead:
    """What came of a run over prompts."""

    likeliest: np.ndarray
    """int64 [m]: after each prompt."""
    num_tokens: int
    """That were read, those that fill prompts up counted too."""
    told: tuple[int, ...]
    """There are logits after so many tokens of each prompt: its last one, or all."""
    rows: RowLogits | HostLogits
    memory: ort.OrtValue
    vocabulary: int

    @property
    def width(self) -> int:
        """From the logits of one prompt to those of the next one, in tokens."""
        return max(self.told)

    def places(self, at: int) -> np.ndarray:
        """int64 [n]: where the logits of one of the prompts lie."""
        return at * self.width + np.arange(self.told[at])

    def logits(self, places: np.ndarray) -> np.ndarray:
        """float32 [m, vocabulary]; until the next prompts are read."""
        shape = [len(self.told), self.width, self.vocabulary]
        return self.rows.read(self.memory, shape, places)


def require_cache(folder: Path, device: tuple[str, int], dtype: str) -> None:
    """Refuse a cache on a device whose attention cannot write to it.

    Onnxruntime's GroupQueryAttention in float32 is the CPU's alone: over memory of CUDA it computes
    on copies, and rows of a cache that others share would be lost.

    Raises:
        ProviderError: it is float32 on CUDA.
    """
    if device[0] == "cuda" and dtype == "float32":
        raise ProviderError(
            f"{folder}: in float32 the attention of this decoder is the CPU's, and its cache cannot"
            " be on CUDA; pass providers=['cpu'], or build with export: {dtype: float16}"
        )


class Runner:
    """The graph of a folder with a genai_config.json, over a cache of fixed size.

    One thread uses it: onnxruntime keeps a captured graph with the thread that made it, and a
    session with such graphs makes one run at a time.
    """

    most_candidates = 1024
    """Of a row, brought to the host by `top`; beyond that `logits` is as quick."""

    def __init__(
        self,
        folder: Path,
        providers: list[tuple[str, dict[str, Any]]],
        capture: bool,
        stacks: Mapping[str, ort.OrtValue],
        rows: int | None,
        length: int | None,
        reread_length: int | None = None,
        steps: StepFiles | None = None,
        threads: int | None = None,
        kernels: KernelChoice = STOCK,
    ) -> None:
        """
        Args:
            capture: the steps as CUDA graphs; else they run over the same memory as they are.
            stacks: the adapters' memory, in place of the graph's initializers.
            rows, length: see `choose_sizes`.
            reread_length: see rope.py.
            steps: the artifact's; None: it has none, and the host chooses the tokens.
            threads: of the host; None: onnxruntime's own choice.
            kernels: what computes the sites.

        Raises:
            InputError: rows or length are not of this model.
            ProviderError: the provider cannot run here, or cannot capture this graph.
        """
        config = read_genai_config(folder)
        if not config["search"].get("past_present_share_buffer"):
            raise ProviderError(
                f"{folder}: past and present of this graph do not share a buffer, which generation"
                " needs; build the artifact again"
            )
        decoder = config["model"]["decoder"]
        device = devices.session_device(providers[0])
        providers = devices.with_varied_shapes(providers)  # those of prompts
        pairs = devices.with_cuda_graphs(providers) if capture else providers
        if capture and steps is None:
            raise ProviderError(
                f"{folder}: it is of format 4, whose steps cannot be captured; pass"
                " cuda_graphs=False, or build it again"
            )
        try:
            file = folder / decoder["filename"] if steps is None else steps.step
            session = open_session(file, pairs, stacks, threads, kernels.library)
        except ProviderError as error:
            if not capture:
                raise
            raise ProviderError(
                f"{error}. If its steps cannot be captured, pass cuda_graphs=False"
            ) from error
        self._graph: DecoderGraph = read_decoder_graph(
            session, decoder, device, capture, has_next=steps is not None
        )
        graph, self.kernels = self._graph, kernels
        require_cache(folder, device, graph.cache_dtype)
        self.vocabulary = graph.vocabulary
        self.most_weight: float | None = None
        """Of an adapter that a row blends; None: rows use one."""
        if graph.blend_slots is not None:
            self.most_weight = -lowest(NUMPY_DTYPES[graph.cache_dtype])
        self.reread_length = reread_length
        context = int(config["model"]["context_length"])
        self.rows, self.length = choose_sizes(graph, context, rows, length)
        self.joins_prompts = device[0] != "cpu"
        self._top: TopTokens | None = None
        self._wide: RowLogits | HostLogits = HostLogits()
        if steps is not None:
            of = graph.logits_dtype, graph.vocabulary, providers
            self._top = TopTokens(steps.top_tokens, *of)
            self._wide = RowLogits(steps.row_logits, *of)
        elif graph.logits_dtype == "bfloat16":
            raise ProviderError(
                f"{folder}: it is of format 4, which generates in bfloat16 no more; build it again"
            )
        self.cache = Cache(graph, self.rows, self.length)
        self.inputs = RowInputs(graph, self.rows, self.length)
        self._logits = graph.allocate([self.rows, 1, graph.vocabulary], graph.logits_dtype)
        self._prompt_logits: ort.OrtValue | None = None
        self._steps: dict[int, Step] = {}
        self.prompts = PromptGraphs(graph, self.length)
        self._bound: dict[tuple[tuple[int, ...], int], Any] = {}

    def using(self) -> AbstractContextManager[None]:
        """What the thread that uses it holds as it does."""
        return using(self._graph.device)

    def step_rows(self, num: int) -> int:
        """So many rows has the step for the first `num`: captured ones round up to a power of two.

        On a CPU there are two at least, where there are: onnxruntime's product of one row rounds
        otherwise, and what a row gives shall not depend on who else is there.
        """
        if self._graph.capture:
            return min(1 << (num - 1).bit_length(), self.rows)
        least = 2 if self._graph.device[0] == "cpu" else 1
        return min(max(num, least), self.rows)

    def reads_at_once(self, tokens: int) -> bool:
        """Whether a prompt is one captured run, which takes less than the rest behind a prefix."""
        return self.prompts.size_for(tokens) is not None

    def has_step(self, rows: int) -> bool:
        return rows in self._steps

    def make_step(self, rows: int) -> None:
        """Bind a step, and capture it, in which no row goes on meanwhile."""
        graph = self._graph
        step = Step(graph, self.cache, self.inputs, rows, int(self._logits.data_ptr()))
        if graph.capture:
            with capturing(graph.device):
                step.run()
            _LOG.info("captured the decode step of %d rows of up to %d tokens", rows, self.length)
        self._steps[rows] = step

    def step(self, rows: int) -> None:
        """One token for each of the first rows; `inputs` has the likeliest ones then."""
        self._steps[rows].run()
        if not self._graph.next:
            self.inputs.advance(likeliest_tokens(self.logits(np.arange(rows))))

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """float32 [m, vocabulary], of rows after a step."""
        return self._wide.read(self._logits, self._shape(), rows)

    def top(self, rows: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        """(logits float32, tokens int64) [m, num], the highest of rows after a step."""
        if self._top is None:
            pairs = [likeliest(logits, num) for logits in self.logits(rows)]
            return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])
        key = tuple(rows.tolist()), num
        if key not in self._bound:
            if len(self._bound) >= _BOUND:
                self._bound.clear()
            address = int(self._logits.data_ptr())
            self._bound[key] = self._top.bind(address, self._shape(), rows, num)
        values, tokens = self._bound[key].run()
        return values, tokens

    def read(
        self,
        row: int,
        prompts: Sequence[np.ndarray],
        uses: Sequence[RowUse],
        past: int,
        wholes: Sequence[int],
        tells_all: bool = False,
    ) -> PromptRead:
        """Read tokens into a row, or from their beginning into rows that lie side by side.

        Args:
            wholes: of how many tokens the texts are that these are parts of.
            tells_all: logits after all tokens of the one prompt, and not after its last one alone.
        """
        width, num = max(map(len, prompts)), len(prompts)
        captured = None if tells_all else self.prompts.find(prompts, past)
        if captured is not None:
            chosen = np.array([captured.run(prompts[0], uses[0], wholes[0])])
            self.cache.copy(0, row, width, captured.cache)
            of = self._wide, captured.logits, self.vocabulary
            return PromptRead(chosen, captured.tokens, (1,), *of)
        graph, told = self._graph, (1,) * num
        if tells_all or graph.tells_all:
            told = tuple(map(len, prompts))
        memory = self._prompt_memory(num * max(told))
        to = int(memory.data_ptr()), tells_all
        chosen = read_prompts(graph, self.cache, row, prompts, uses, past, wholes, *to)
        of = self._wide, memory, self.vocabulary
        read = PromptRead(chosen, num * width, told, *of)
        if graph.next:
            return read
        ends = np.array([read.places(at)[-1] for at in range(len(prompts))])
        return replace(read, likeliest=likeliest_tokens(read.logits(ends)))

    def release(self) -> None:
        """Give captured graphs and memory up."""
        with self.using():
            for step in self._steps.values():
                step.release()
            self._steps.clear()
            self.prompts.release()
            self._bound.clear()
            self.cache.release()
            self._prompt_logits = None

    def _shape(self) -> list[int]:
        return [self.rows, 1, self.vocabulary]

    def _prompt_memory(self, tokens: int) -> ort.OrtValue:
        """Memory for the logits of so many tokens, as large as the most so far."""
        size = tokens * self.vocabulary
        if self._prompt_logits is None or math.prod(self._prompt_logits.shape()) < size:
            self._prompt_logits = None  # first, so that both are never there
            self._prompt_logits = self._graph.allocate([size], self._graph.logits_dtype)
        return self._prompt_logits
