"""The engine across windows and longrope's first length: parts, reuse and crossing give what one
run over the whole text so far gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.decoders import make_prompts, open_engine, write_family
from support.home import Home
from support.waiting import DEADLINE

from loraexport_runtime.generation.engine import GenerationEngine
from loraexport_runtime.generation.handle import Generation, GenerationHandle
from loraexport_runtime.generation.loop import rows as row_module
from loraexport_runtime.generation.request import GenerationRequest
from loraexport_runtime.generation.steps.prompts import PromptGraph

pytestmark = pytest.mark.slow
WINDOWS = ("Mistral", "Phi-3", "Gemma 2", "Qwen2 with windows")
NAMES = (None, "first", "second")
STEPS = 12


class Whole:
    """A graph as it was built, run over whole texts alone."""

    def __init__(self, artifact: Path) -> None:
        self._session = ort.InferenceSession(
            artifact / "generator/model.onnx", providers=["CPUExecutionProvider"]
        )

    def logprobs(self, tokens: list[int], slot: int) -> np.ndarray:
        """float64 [vocabulary], of what follows."""
        ids = np.array([tokens])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds["adapter_ids"] = np.array([slot])
        for entry in self._session.get_inputs():
            if entry.name.startswith("past_key_values"):
                feeds[entry.name] = np.zeros((1, 2, 0, 16), np.float32)
        logits = self._session.run(["logits"], feeds)[0][0, -1].astype(np.float64)
        high = logits.max()
        likely: np.ndarray = logits - high - np.log(np.exp(logits - high).sum())
        return likely


def check(
    whole: Whole, engine: GenerationEngine, prompt: list[int], name: str | None, got: Generation
) -> list[int]:
    """Its tokens, each the likeliest of the text so far, with that one's logprob."""
    tokens = got.answers[0].tokens
    text, slot = [*prompt], engine.adapters.get(name or "", 0)
    for at, told in enumerate(tokens):
        wanted = whole.logprobs(text, slot)
        assert told.token == wanted.argmax(), f"token {at} after {len(prompt)}"
        assert told.logprob == pytest.approx(wanted[told.token], abs=1e-3), f"token {at}"
        text.append(told.token)
    return [told.token for told in tokens]


def send(
    engine: GenerationEngine, tokens: list[int], name: str | None, num: int = STEPS
) -> GenerationHandle:
    options: dict[str, Any] = {"max_tokens": num, "ignore_eos": True, "logprobs": 0}
    return engine.submit(GenerationRequest(tokens=tokens, adapter=name, **options))


@pytest.fixture(params=[*WINDOWS, "Phi-3.5"])
def artifact(request: pytest.FixtureRequest, home: Home) -> Path:
    return home.artifact(write_family, request.param)


@pytest.fixture
def engine(artifact: Path) -> Iterator[GenerationEngine]:
    """It reads prompts in parts shorter than a window."""
    with open_engine(artifact, rows=3, quota=5) as engine:
        yield engine


@pytest.mark.parametrize("joins", [False, True])
def test_parts_and_reuse_give_what_whole_texts_give(
    artifact: Path, engine: GenerationEngine, joins: bool
) -> None:
    """Texts that begin before, at and behind the length, of each adapter, side by side."""
    engine._worker._prompts._joins = joins
    whole, prompts = Whole(artifact), make_prompts(2, 7, 11, 12, 13, 40)
    sent = [send(engine, prompt, NAMES[at % 3]) for at, prompt in enumerate(prompts)]
    for at, (prompt, handle) in enumerate(zip(prompts, sent, strict=True)):
        answer = check(whole, engine, prompt, NAMES[at % 3], handle.result(DEADLINE))
    longer = [*prompts[-1], *answer[:-4], *make_prompts(9)[0]]
    got = send(engine, longer, NAMES[5 % 3]).result(DEADLINE)
    assert got.reused_tokens >= 40 + len(answer) - 4 - 1
    check(whole, engine, longer, NAMES[5 % 3], got)
    # Its first tokens alone, over what the longer text has left behind them.
    got = send(engine, longer[:30], NAMES[5 % 3]).result(DEADLINE)
    assert got.reused_tokens == 28
    check(whole, engine, longer[:30], NAMES[5 % 3], got)


def test_prompts_of_fixed_sizes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured on CUDA: filled up, on both sides of longrope's length, and the first part
    of a longer text."""
    monkeypatch.setattr(PromptGraph, "release", lambda graph: None)  # CUDA's
    artifact = home.artifact(write_family, "Phi-3.5")
    whole, prompts = Whole(artifact), make_prompts(7, 12, 13, 30, 40)
    with open_engine(artifact, rows=3, quota=32) as engine:
        graphs = engine._worker._runner.prompts
        graphs.shapes = [(1, 16), (1, 32)]
        for at, prompt in enumerate(prompts):
            name = NAMES[at % 3]
            check(whole, engine, prompt, name, send(engine, prompt, name).result(DEADLINE))
        assert set(graphs._made) == {(1, 16), (1, 32)}


def test_no_prefix_of_other_factors_is_reused(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_module, "LEAST_PREFIX", 4)
    artifact = home.artifact(write_family, "Phi-3.5")
    whole, (text,) = Whole(artifact), make_prompts(40)
    # (tokens of the prompt, tokens of the answer, tokens reused): up to 12 are short.
    cases = [(8, 2, 0), (9, 3, 7), (30, 2, 0), (35, 2, 30), (7, 2, 5), (9, 8, 7), (20, 2, 18)]
    with open_engine(artifact, rows=4, quota=5) as engine:
        for size, num, reused in cases:
            got = send(engine, text[:size], "first", num).result(DEADLINE)
            assert got.reused_tokens == reused, (size, num)
            check(whole, engine, text[:size], "first", got)
