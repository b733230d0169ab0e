"""A decoder's session and its rows: prompts are read, steps are made, logits are looked at."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
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
from .prompts import PromptCache, PromptRead, read_prompts
from .sizes import choose_sizes
from .step import NOTHING, RowInputs, Step
from .top_tokens import RowLogits, TopTokens

_LOG = logging.getLogger(__name__)
_BOUND = 64
"""So many selections of rows keep their bindings."""


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
        self.is_remote = device[0] != "cpu"
        """Whether the host has time while a run goes on. There prompts are read together; on a CPU
        what a row gives shall not depend, to the last bit, on who else is there."""
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
        self.prompts = PromptCache(graph, self.rows, self.length)
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
        return self.prompts.shape_for(1, tokens) is not None

    def has_step(self, rows: int) -> bool:
        return rows in self._steps

    def make_step(self, rows: int) -> None:
        """Bind a step, and capture it, in which no row goes on meanwhile."""
        graph = self._graph
        step = Step(graph, self.cache, self.inputs, rows, int(self._logits.data_ptr()))
        if graph.capture:
            self._settle()
            with capturing(graph.device):
                step.run()
            _LOG.info("captured the decode step of %d rows of up to %d tokens", rows, self.length)
        self._steps[rows] = step

    def step(self, rows: int, meanwhile: AbstractContextManager[None] = NOTHING) -> None:
        """One token for each of the first rows; `inputs` has the likeliest ones then.

        Args:
            meanwhile: what is done as the device computes; it may put inputs of the next step.
        """
        self._settle()
        with meanwhile:
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
        rows: Sequence[int],
        prompts: Sequence[np.ndarray],
        uses: Sequence[RowUse],
        past: int,
        wholes: Sequence[int],
        tells_all: bool = False,
        meanwhile: AbstractContextManager[None] = NOTHING,
    ) -> PromptRead:
        """Read tokens into a row, or from their beginning into several.

        Args:
            wholes: of how many tokens the texts are that these are parts of.
            tells_all: logits after all tokens of the one prompt, and not after its last one alone.
            meanwhile: as of `step`.
        """
        longest, num, graph = max(map(len, prompts)), len(prompts), self._graph
        shape = None if past or tells_all else self.prompts.shape_for(num, longest)
        if shape is not None:
            run = self.prompts.captured(*shape)
            chosen = run.run(prompts, uses, wholes, meanwhile)
            self._take(run.cache, rows, prompts)
            of = self._wide, run.logits, self.vocabulary
            return PromptRead(chosen, math.prod(shape), (1,) * num, *of)
        told = tuple(map(len, prompts)) if tells_all or graph.tells_all else (1,) * num
        memory = self._prompt_memory(num * max(told))
        cache, first = self.cache, rows[0]
        if list(rows) != list(range(first, first + num)):  # they do not lie side by side
            cache, first = self.prompts.room(num, longest), 0
            cache.clear_all()  # another tenant's
        to = int(memory.data_ptr()), tells_all, meanwhile
        chosen = read_prompts(graph, cache, first, prompts, uses, past, wholes, *to)
        if cache is not self.cache:
            self._take(cache, rows, prompts)
        of = self._wide, memory, self.vocabulary
        read = PromptRead(chosen, num * longest, told, *of)
        if graph.next:
            return read
        ends = np.array([read.places(at)[-1] for at in range(num)])
        return replace(read, likeliest=likeliest_tokens(read.logits(ends)))

    def _take(self, cache: Cache, rows: Sequence[int], prompts: Sequence[np.ndarray]) -> None:
        """Copy what was read of prompts into their rows."""
        for at, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            self.cache.copy(at, row, len(prompt), cache)

    def _settle(self) -> None:
        """What was put and begun is there for a run."""
        self.inputs.write()
        self.cache.wait()

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
