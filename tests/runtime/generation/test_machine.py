"""Whatever else is submitted, cancelled, loaded, replaced, unloaded and pinned: a request gives
what it gives alone, token for token; on a CUDA device, where a step of other rows rounds otherwise,
up to a token that is as likely as rounding can tell."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.decoders import make_prompts, make_remote, open_engine, write_tenants
from support.home import Home
from support.waiting import DEADLINE

import loraexport_runtime as lr
from loraexport_runtime.generation.engine import GenerationEngine
from loraexport_runtime.generation.handle import GeneratedToken, GenerationHandle
from loraexport_runtime.generation.request import GenerationRequest

NAMES = ("first", "second", "third")
CONTENTS = ("first", "second", "more-0", "more-1", "more-2", "more-3")
LONG = 30
# Some begin alike, so that rows are continued; 33 and 64 end a chunk of 32 by one token or none.
WHOLE = make_prompts(70)[0]
PROMPTS = [WHOLE[:size] for size in (1, 2, 20, 33, 64, 70)] + make_prompts(5, 17, 41)


@dataclass(eq=False)
class Sent:
    """A request on its way, and what its adapter's name has meant since."""

    prompt: int
    max_tokens: int
    name: str | None
    handle: GenerationHandle
    contents: set[str | None]
    may_be_unknown: bool = False
    is_cancelled: bool = False


@dataclass
class Alone:
    """What each prompt gives with nothing else in the engine; an engine that is open all along."""

    open: Callable[..., GenerationEngine]
    folder: Path
    near: float
    """Of two tokens whose logprobs differ by less either may come; then texts part."""
    seen: dict[tuple[int, str | None], Sequence[GeneratedToken]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = self.open(rows=2)

    def request(self, prompt: int, name: str | None, max_tokens: int) -> GenerationRequest:
        """A text that may part at its end from another one has none."""
        return GenerationRequest(
            tokens=PROMPTS[prompt],
            adapter=name,
            max_tokens=max_tokens,
            ignore_eos=self.near > 0,
        )

    def gives(self, found: Sequence[int], prompt: int, content: str | None, most: int) -> bool:
        """Whether these are the first `most` tokens, or all if there are fewer."""
        wanted = self.tokens(prompt, content)[:most]
        if len(found) != len(wanted):
            return False
        for token, alone in zip(found, wanted, strict=True):
            if token != alone.token:
                likely = dict(alone.likeliest)
                return alone.logprob - likely.get(token, -np.inf) < self.near
        return True

    def tokens(self, prompt: int, content: str | None) -> Sequence[GeneratedToken]:
        if (prompt, content) not in self.seen:
            name = None if content is None else "alone"
            if content is not None:
                self.engine.load_adapter("alone", self.folder / content)
            # Asked what it thinks of its prompt, it reads all of it.
            request = self.request(prompt, name, LONG)
            request = replace(request, prompt_logprobs=0, logprobs=5)
            found = self.engine.submit(request).result(DEADLINE).answers[0]
            self.seen[prompt, content] = found.tokens
        return self.seen[prompt, content]


def make_machine(alone: Alone) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.engine = alone.open(rows=3)
            self.contents: dict[str, str] = {"first": "first", "second": "second"}
            self.pinned: set[str] = set()
            self.sent: list[Sent] = []
            self.beside: list[GenerationHandle] = []

        @rule(
            prompt=st.sampled_from(range(len(PROMPTS))),
            name=st.sampled_from((None, *NAMES)),
            max_tokens=st.sampled_from((1, 3, LONG)),
        )
        def submit(self, prompt: int, name: str | None, max_tokens: int) -> None:
            request = alone.request(prompt, name, max_tokens)
            if name is not None and name not in self.contents:
                with pytest.raises(lr.UnknownAdapterError):
                    self.engine.submit(request)
                return
            try:
                handle = self.engine.submit(request)
            except lr.SlotsExceededError:
                assert name not in self.pinned
                assert len(self.pinned) == 2
                return
            content = None if name is None else self.contents[name]
            self.sent.append(Sent(prompt, max_tokens, name, handle, {content}))

        @precondition(lambda self: "first" in self.contents)
        @rule(
            prompt=st.sampled_from(range(len(PROMPTS))),
            options=st.sampled_from(({"temperature": 1.0, "seed": 1}, {"logprobs": 2})),
        )
        def submit_beside(self, prompt: int, options: dict[str, Any]) -> None:
            """Of its row the host chooses the tokens; it is the others that are held to."""
            request = replace(alone.request(prompt, "first", LONG), **options)
            self.beside.append(self.engine.submit(request))

        @rule(name=st.sampled_from(NAMES), content=st.sampled_from(CONTENTS))
        def load(self, name: str, content: str) -> None:
            for sent in self.sent:  # it may be admitted before or after
                if sent.name == name:
                    sent.contents.add(content)
            try:
                self.engine.load_adapter(name, alone.folder / content, timeout=DEADLINE)
            except lr.SlotsExceededError:
                assert len(self.pinned) == 2
                return
            self.contents[name] = content

        @precondition(lambda self: self.contents)
        @rule(data=st.data())
        def unload(self, data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(sorted(self.contents)))
            self.engine.unload_adapter(name)
            del self.contents[name]
            self.pinned.discard(name)
            for sent in self.sent:
                sent.may_be_unknown |= sent.name == name

        @precondition(lambda self: self.contents)
        @rule(data=st.data())
        def pin(self, data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(sorted(self.contents)))
            try:
                self.engine.pin(name, timeout=DEADLINE)
            except lr.SlotsExceededError:
                assert len(self.pinned - {name}) == 2
                return
            self.pinned.add(name)

        @precondition(lambda self: self.pinned)
        @rule(data=st.data())
        def unpin(self, data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(sorted(self.pinned)))
            self.engine.unpin(name)
            self.pinned.remove(name)

        @precondition(lambda self: self.sent)
        @rule(data=st.data())
        def cancel(self, data: st.DataObject) -> None:
            sent = data.draw(st.sampled_from(self.sent))
            sent.handle.cancel()
            sent.is_cancelled = True

        @precondition(lambda self: self.sent)
        @rule(data=st.data())
        def finish(self, data: st.DataObject) -> None:
            sent = self.sent.pop(data.draw(st.sampled_from(range(len(self.sent)))))
            self.check(sent)

        @invariant()
        def counts_are_sound(self) -> None:
            stats = self.engine.stats()
            assert stats.running <= 3
            assert stats.slots_held <= 2
            assert set(self.engine.list_adapters()) == set(self.contents)

        def check(self, sent: Sent) -> None:
            try:
                answer = sent.handle.result(DEADLINE).answers[0]
            except lr.UnknownAdapterError:
                assert sent.may_be_unknown
                return
            except lr.SlotsExceededError:  # pinned while it waited
                return
            found = [one.token for one in answer.tokens]
            is_cancelled = answer.finish_reason == "cancelled"
            assert sent.is_cancelled or not is_cancelled
            most = len(found) if is_cancelled else sent.max_tokens
            assert any(alone.gives(found, sent.prompt, content, most) for content in sent.contents)

        def teardown(self) -> None:
            for sent in self.sent:
                self.check(sent)
            for handle in self.beside:
                with suppress(lr.UnknownAdapterError, lr.SlotsExceededError):
                    handle.result(DEADLINE)
            slots = self.engine.host.slots
            assert slots._table._claims == set()
            self.engine.close()

    return Machine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("provider", "dtype", "near"),
    [
        ("cpu", "float32", 0.0),
        ("remote", "float32", 1e-4),
        pytest.param(
            "cuda",
            "float16",
            0.1,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_request_gives_what_it_gives_alone(
    provider: str, dtype: str, near: float, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`remote`: on the CPU as on a device; prompts of other rows round otherwise there too."""
    if provider == "remote":
        make_remote(monkeypatch)
        provider = "cpu"
    changes = {} if dtype == "float32" else {"parity": {"tolerance": 0.05}}
    artifact = home.artifact(write_tenants, export={"dtype": dtype}, **changes)
    open_rows = partial(open_engine, artifact, provider, capture=provider == "cuda", quota=32)
    alone = Alone(open_rows, artifact.parents[1], near)
    texts = {tuple(one.token for one in alone.tokens(4, content)) for content in (None, *CONTENTS)}
    assert len(texts) == 1 + len(CONTENTS), "the contents differ"
    machine = make_machine(alone).TestCase
    machine.settings = settings(
        max_examples=12,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    machine("runTest").runTest()
    alone.engine.close()
