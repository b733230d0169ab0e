"""Adapters that are loaded, replaced and unloaded in a decoder's engine beside running requests.

Takes an artifact of `support.decoders.write_tenants`, which this module does not import: torch
would be most of the memory that is measured.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import loraexport_runtime as lr
from loraexport_runtime.generation.engine import GenerationEngine
from loraexport_runtime.generation.handle import GenerationHandle
from loraexport_runtime.generation.request import GenerationRequest

from .threads import resident_bytes

NAMES = ("one", "two", "three")
CARRIED = ("first", "second")
VERSIONS = (*CARRIED, "more-0", "more-1", "more-2", "more-3")
"""Folders beside the artifact's spec; what the names are made to mean."""
ROWS = 4
_LENGTHS = (1, 2, 17, 20, 40, 60)
_LONG = 12
_MOST_OPEN = 6
_ADMITTED = 0.9
"""Share of the requests that are in a row when the next change comes."""
_MAX_FINDINGS = 20


@dataclass(eq=False)
class _Sent:
    """A request on its way, and what its adapter's name may have meant when it was admitted."""

    prompt: int
    max_tokens: int
    name: str | None
    handle: GenerationHandle
    contents: set[str | None]
    may_be_unknown: bool = False

    @property
    def is_admitted(self) -> bool:
        return self.handle.began is not None or self.handle.is_done


@dataclass
class LoadsResult:
    """What the cycles came to."""

    cycles: int = 0
    """Each loads an adapter, replaces it and unloads it."""
    requests: int = 0
    """Finished ones, each of them held to the same request alone."""
    tokens: int = 0
    exact: int = 0
    """Requests that only one content could have been."""
    unknown: int = 0
    """Requests whose adapter was unloaded before they were admitted."""
    wrong: int = 0
    """Tokens that differ from those of the same request alone."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of the process: `start`, `warm` once the warm-up's cycles are over, `end`."""
    findings: list[str] = field(default_factory=list)
    """Wrong answers and errors; the first twenty."""

    def growth(self, warm_up: int) -> float:
        """Bytes for every 1,000 cycles after the warm-up."""
        return 1000 * (self.memory["end"] - self.memory["warm"]) / max(1, self.cycles - warm_up)


def run_loads(
    artifact: Path, folder: Path, cycles: int, warm_up: int, patience_s: float = 60.0
) -> LoadsResult:
    """Run so many cycles.

    Args:
        folder: with the adapters that VERSIONS names.
        warm_up: cycles after which memory counts as warm.
        patience_s: what a load may wait for a slot, and a request for its last token.
    """
    paths = {name: folder / name for name in VERSIONS}
    with lr.load_generator(artifact, rows=ROWS) as generator:
        prompts = _draw_prompts(generator.engine.vocabulary)
        alone = _run_alone(generator.engine, prompts, paths)
    with lr.load_generator(artifact, rows=ROWS) as generator:
        return _Cycles(generator.engine, prompts, alone, paths, patience_s).run(cycles, warm_up)


def _draw_prompts(vocabulary: int) -> list[list[int]]:
    """Some begin alike, so that rows are continued."""
    generator = np.random.default_rng(5)
    whole = generator.integers(3, vocabulary, max(_LENGTHS)).tolist()
    others = [generator.integers(3, vocabulary, size).tolist() for size in (5, 33)]
    return [whole[:size] for size in _LENGTHS] + others


def _run_alone(
    engine: GenerationEngine, prompts: Sequence[Sequence[int]], paths: dict[str, Path]
) -> dict[tuple[int, str | None], list[int]]:
    """(prompt, content) -> the tokens of a request with nothing else in the engine."""
    tokens = {}
    for content in (None, *paths):
        if content is not None:
            engine.load_adapter("alone", paths[content])
        for index, prompt in enumerate(prompts):
            # Asked what it thinks of its prompt, it reads all of it.
            request = GenerationRequest(
                tokens=prompt,
                adapter=None if content is None else "alone",
                max_tokens=_LONG,
                prompt_logprobs=0,
            )
            tokens[index, content] = _tokens_of(engine.submit(request), 60.0)
    return tokens


def _tokens_of(handle: GenerationHandle, patience_s: float) -> list[int]:
    return [one.token for one in handle.result(patience_s).answers[0].tokens]


class _Cycles:
    def __init__(
        self,
        engine: GenerationEngine,
        prompts: Sequence[Sequence[int]],
        alone: dict[tuple[int, str | None], list[int]],
        paths: dict[str, Path],
        patience_s: float,
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.alone = alone
        self.paths = paths
        self.patience_s = patience_s
        self.draw = random.Random(0)
        self.contents: dict[str, str] = {name: name for name in CARRIED}
        self.open: list[_Sent] = []
        self.result = LoadsResult()

    def run(self, cycles: int, warm_up: int) -> LoadsResult:
        result = self.result
        result.memory["start"] = resident_bytes()
        try:
            while result.cycles < cycles and not result.findings:
                self._cycle(self.draw.choice(NAMES))
                result.cycles += 1
                if result.cycles == warm_up:
                    result.memory["warm"] = resident_bytes()
            while self.open:
                self._check(self.open.pop(0))
        except Exception as error:
            result.findings.append(f"cycle {result.cycles}: {type(error).__name__}: {error}")
        result.memory["end"] = resident_bytes()
        del result.findings[_MAX_FINDINGS:]
        return result

    def _cycle(self, name: str) -> None:
        """Load an adapter, replace it and unload it, with requests before each and after."""
        first, second = self.draw.sample(VERSIONS, 2)
        for content in (first, second):
            self._load(name, content)
            self._submit(name)
            if self.draw.random() < 0.3:
                self._submit(self.draw.choice((None, *CARRIED)))
        self.engine.unload_adapter(name)
        del self.contents[name]
        for sent in self.open:
            sent.may_be_unknown |= sent.name == name and not sent.is_admitted

    def _load(self, name: str, content: str) -> None:
        for sent in self.open:
            if sent.name == name and not sent.is_admitted:  # it may be admitted after it
                sent.contents.add(content)
        self.engine.load_adapter(name, self.paths[content], timeout=self.patience_s)
        self.contents[name] = content

    def _submit(self, name: str | None) -> None:
        while len(self.open) >= _MOST_OPEN:
            self._check(self.open.pop(0))
        prompt, max_tokens = self.draw.randrange(len(self.prompts)), self.draw.choice((1, 4, _LONG))
        request = GenerationRequest(
            tokens=self.prompts[prompt], adapter=name, max_tokens=max_tokens
        )
        content = None if name is None else self.contents[name]
        sent = _Sent(prompt, max_tokens, name, self.engine.submit(request), {content})
        self.open.append(sent)
        # Most are in a row when their adapter is replaced or unloaded; the others may still wait.
        waits_s = self.patience_s if self.draw.random() < _ADMITTED else 0.0
        end = time.monotonic() + waits_s
        while not sent.is_admitted and time.monotonic() < end:
            time.sleep(0.0002)

    def _check(self, sent: _Sent) -> None:
        result = self.result
        try:
            found = _tokens_of(sent.handle, self.patience_s)
        except lr.UnknownAdapterError:
            if not sent.may_be_unknown:
                raise
            result.unknown += 1
            return
        result.requests += 1
        result.tokens += len(found)
        result.exact += len(sent.contents) == 1
        wanted = [self.alone[sent.prompt, one][: sent.max_tokens] for one in sent.contents]
        if found not in wanted:
            wrong = min(_num_different(found, tokens) for tokens in wanted)
            result.wrong += wrong
            result.findings.append(
                f"cycle {result.cycles}: {wrong} of {len(found)} tokens of {sent.name!r} are wrong,"
                f" prompt {sent.prompt}, as {sorted(map(str, sent.contents))}: {found}"
            )


def _num_different(found: Sequence[int], wanted: Sequence[int]) -> int:
    same = sum(a == b for a, b in zip(found, wanted, strict=False))
    return max(len(found), len(wanted)) - same
