"""Grammars: an answer's text is what its grammar says, beside others that have none."""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.decoders import make_prompts, write_tenants
from support.home import Home
from support.waiting import DEADLINE

import loraexport_runtime as lr
from loraexport_runtime.generation.grammar import Grammar
from loraexport_runtime.generation.request import GenerationRequest
from loraexport_runtime.generation.text.stream import TextStream

pytest.importorskip("llguidance")

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"kind": {"enum": ["ship", "port"]}, "on": {"type": "boolean"}},
        "required": ["kind", "on"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    return home.artifact(write_tenants)


@pytest.fixture(scope="module")
def generator(artifact: Path) -> Iterator[lr.TextGenerator]:
    with lr.load_generator(artifact, rows=4) as generator:
        yield generator


def submit(generator: lr.TextGenerator, grammar: Grammar | None, **options: Any) -> Any:
    request = GenerationRequest(
        **({"tokens": make_prompts(9)[0], "grammar": grammar, "max_tokens": 60} | options)
    )
    return generator.engine.submit(request)


def read(generator: lr.TextGenerator, handle: Any) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    answer = handle.result(DEADLINE).answers[0]
    stream = TextStream(generator.tokenizer, ())
    text = "".join(stream.push(token.token) for token in answer.tokens)
    return text + stream.finish(), answer.finish_reason


def test_answers_match_their_grammars(generator: lr.TextGenerator) -> None:
    """In one batch, with an answer between them that has none."""
    sent = [
        submit(generator, Grammar("regex", "[ab]{5}")),
        submit(generator, None, adapter="first", ignore_eos=True),
        submit(generator, Grammar("ebnf", 'start: "hello" ("!" | " world")'), adapter="second"),
        submit(generator, Grammar("json_schema", SCHEMA), adapter="first", temperature=2.0),
        submit(generator, Grammar("regex", "[ab]{5}"), temperature=5.0, top_k=0, seed=1),
    ]
    texts = [read(generator, handle) for handle in sent]
    assert re.fullmatch("[ab]{5}", texts[0][0])
    assert len(sent[1].result().answers[0].tokens) == 60
    assert texts[2][0] in ("hello!", "hello world")
    if texts[3][1] == "stop":  # white space between the parts may be as long as the answer
        found = json.loads(texts[3][0])
        assert found["kind"] in ("ship", "port")
        assert isinstance(found["on"], bool)
    assert re.fullmatch("[ab]{5}", texts[4][0])
    assert [texts[index][1] for index in (0, 1, 2, 4)] == ["stop", "length", "stop", "stop"]
    alone = submit(generator, None, adapter="first", ignore_eos=True)
    assert alone.result(DEADLINE).answers == sent[1].result().answers


def test_each_answer_matches_by_itself(generator: lr.TextGenerator) -> None:
    handle = submit(generator, Grammar("regex", "[ab]{6}"), n=4, temperature=5.0, top_k=0, seed=3)
    answers = handle.result(DEADLINE).answers
    assert len({tuple(one.token for one in answer.tokens) for answer in answers}) > 1
    assert {answer.finish_reason for answer in answers} == {"stop"}


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("[a", "grammar is '\\[a'; expected a Grammar, or None"),
        (Grammar("regex", ""), "grammar.text is ''; expected a text of at most 65,536 characters"),
        (Grammar("regex", "a" * 65_537), "expected a text of at most 65,536 characters"),
        (Grammar("lark", "x"), "grammar.kind is 'lark'; expected 'json_schema', 'regex' or 'ebnf"),
        (Grammar("regex", "[a"), "(?s)grammar: this is no regex: .*unclosed character class"),
        (Grammar("json_schema", '{"type": 3}'), "grammar: this is no json_schema: type must be"),
        (Grammar("json_schema", "{"), "grammar: this is no json_schema"),
        (Grammar("json_schema", "true"), "grammar: this is no json_schema: it is no JSON object"),
        (Grammar("json_schema", '{}}, {"lark_grammar": {}'), "this is no json_schema: Extra data"),
        (Grammar("json_schema", '{"a":' * 5000), "grammar: this is no json_schema"),
        (Grammar("ebnf", "start: nothing"), "grammar: this is no ebnf"),
    ],
)
def test_a_grammar_that_is_none(generator: lr.TextGenerator, grammar: Any, text: str) -> None:
    with pytest.raises(lr.InputError, match=text):
        submit(generator, grammar)


def test_a_grammar_that_fails_fails_its_request_only(
    generator: lr.TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraexport_runtime.generation import grammar

    def fail(match: grammar.Match) -> None:
        raise ValueError("mask size")

    monkeypatch.setattr(grammar.Match, "mask", fail)
    sent = submit(generator, Grammar("regex", "[ab]{5}")), submit(generator, None, max_tokens=4)
    with pytest.raises(lr.StepError, match="mask size"):
        sent[0].result(DEADLINE)
    assert sent[1].result(DEADLINE).answers


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Is called, while it has something, by each thread that compiles a grammar."""
    import llguidance

    real, calls = llguidance.LLMatcher, list[Callable[[], object]]()

    class Slow:
        grammar_from_json_schema = staticmethod(real.grammar_from_json_schema)
        grammar_from_lark = staticmethod(real.grammar_from_lark)
        grammar_from_regex = staticmethod(real.grammar_from_regex)

        def __new__(cls, *args: Any, **options: Any) -> Any:
            calls.pop()()
            return real(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", Slow)
    return calls


def test_others_go_on_while_a_grammar_is_compiled(
    generator: lr.TextGenerator, compiling: list[Callable[[], object]]
) -> None:
    """The engine makes all steps of another answer meanwhile."""
    num_steps: list[int] = []

    def answer_another() -> None:
        before = generator.engine.stats().steps
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(submit, generator, None, ignore_eos=True, max_tokens=40)
            sent.result(DEADLINE).result(DEADLINE)
        num_steps.append(generator.engine.stats().steps - before)

    compiling.append(answer_another)
    assert read(generator, submit(generator, Grammar("regex", "[ab]{5}")))[1] == "stop"
    assert num_steps[0] >= 39


def test_who_asks_computes_what_may_come_first(
    generator: lr.TextGenerator,
    compiling: list[Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for all answers, of which none needs more: a letter is all that it allows."""
    from loraexport_runtime.generation import grammar

    threads: list[str] = []
    read_bits = grammar._read_bits

    def note(matcher: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return read_bits(matcher)

    monkeypatch.setattr(grammar, "_read_bits", note)
    compiling.append(lambda: None)
    prompt = make_prompts(9)[0]
    grammar_of_one = Grammar("regex", "a")
    request = GenerationRequest(tokens=prompt, n=2, max_tokens=9, grammar=grammar_of_one)
    for handle in generator.engine.submit_all([request, request]):
        assert {len(answer.tokens) for answer in handle.result(DEADLINE).answers} == {1}
    assert (compiling, threads) == ([], [threading.current_thread().name])


def test_a_grammar_that_becomes_too_complex_is_no_answer(generator: lr.TextGenerator) -> None:
    """It would end where the text does not match."""
    schema = {"type": "object", "properties": {f"p{index}": {} for index in range(1000)}}
    sent = submit(generator, Grammar("json_schema", json.dumps(schema)))
    other = submit(generator, None, max_tokens=4)
    with pytest.raises(lr.InputError, match="grammar: it is too complex at this place of the ans"):
        sent.result(DEADLINE)
    assert other.result(DEADLINE).answers


def test_without_llguidance(generator: lr.TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(lr.ProviderError, match=r"pip install 'loraexport-runtime\[grammar\]'"):
        submit(generator, Grammar("regex", "a"))
