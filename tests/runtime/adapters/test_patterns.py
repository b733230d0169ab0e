"""Regular expressions of adapter files: what `re` says, in bounded time."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peft_adapters import adapter, change_config

from loraexport_runtime.adapters import patterns
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.patterns import ModulePatterns, check_patterns
from loraexport_runtime.errors import AdapterConfigError

FILE = Path("adapter_config.json")
NAMES = ("q", "qv", "layers.1.q", "layers.10.q", "encoder.layers.1.self_attn.q", "a.q.v", "")
SLOW = r"(?:(?:\w|\w\w)+)+"
"""Matches no dotted name, after more steps than there are seconds."""
LONG = "a" * 60 + ".q"


def of(*keys: str) -> ModulePatterns[int]:
    return ModulePatterns({key: i for i, key in enumerate(keys)}, FILE, "rank_pattern")


def as_re(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        *("q", "1.q", "layers.1.q", "layers.1", ".q", "q.", "s.1.s", r"layers\.1\.q", "q|v", "^q"),
        *(r"layers\.\d+\.q", r".*\.layers\.(1|2)\.[a-z_]+\.q", "(?:layers)?.*", "^layers.*q$"),
        *(r"layers\.(?!1\.)\d+\.q", r"(?<=1\.)q", r"layers.\d{1,2}.q", r"l[^.]*s\.1\.q", "q{1}"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_as_re(pattern: str, name: str) -> None:
    assert bool(of(pattern).values(name)) == as_re(pattern, name)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.text("aq.1*+?|()[]{},^$\\d-", max_size=9), st.text("aq.1", max_size=7))
def test_whatever_the_pattern(pattern: str, name: str) -> None:
    """It is refused, or matches as in `re`; never the other way round."""
    try:
        expected = as_re(pattern, name)
    except (re.error, OverflowError):
        with pytest.raises(AdapterConfigError, match="is no regular expression that can be used"):
            of(pattern)
        return
    except FutureWarning:
        return
    try:
        compiled = of(pattern)
    except AdapterConfigError:
        assert "{" in pattern or "[." in pattern, "all others are taken"
        return
    assert bool(compiled.values(name)) == expected


def test_the_first_in_the_files_order() -> None:
    values = of("layers.1.q", "q", r"layers\.\d+\.q")
    assert values.value("encoder.layers.1.q", -1) == 0
    assert values.value("encoder.layers.2.q", -1) == 1
    assert values.values("encoder.layers.1.q") == [0, 1, 2]
    assert values.value("encoder.layers.2.v", -1) == -1


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", r"missing \)"),
        ("*", "nothing to repeat"),
        ("a{99999999999999999}", "multiply to more than 10,000"),
        ("(?:x{1000}){1000}", "multiply to more than 10,000"),  # 10 GB once compiled
        ("(" * 5000 + ")" * 5000, "recursion"),
        ("a" * 10_001 + "|b", "more than 10,000 characters"),
        ("(?R)", "unknown extension"),  # of the engine, not of re
        (r"\p{L}", "{ stands for itself"),
        ("(?:q){e<=2}", "{ stands for itself"),
        ("[[:alpha:]]", "by number or class"),
        ("\\U0010ffff|a", "by number or class"),
        ("é|a", "no module's name has"),
    ],
    ids=str.__len__,
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_what_is_refused(tmp_path: Path, field: str, pattern: str, problem: str) -> None:
    folder = adapter(tmp_path)
    change_config(folder, **{field: {pattern: 4} if "_pattern" in field else pattern})
    expected = rf"adapter_config\.json: {field}: .* is no regular .*{problem}"
    with pytest.raises(AdapterConfigError, match=expected) as caught:
        read_adapter(folder)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("field", ["exclude_modules", "layers_pattern"])
def test_other_fields_that_peft_matches(tmp_path: Path, field: str) -> None:
    for value in ("(", ["("]):
        folder = adapter(tmp_path)
        change_config(folder, **{field: value})
        if field == "exclude_modules" and isinstance(value, list):
            assert read_adapter(folder).modules  # names, not patterns
        else:
            with pytest.raises(AdapterConfigError, match=f"{field}: '\\(' is no regular"):
                read_adapter(folder)


def test_a_pattern_without_end_holds_up_nobody() -> None:
    """Other threads run while it is matched, and it is given up."""
    done, counts = threading.Event(), [0]

    def count() -> None:
        while not done.is_set():
            counts[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    compiled = of(SLOW)
    before = counts[0]
    with pytest.raises(AdapterConfigError, match=r"rank_pattern: .* takes too long to match"):
        compiled.values("b." + LONG + "-")
    during = counts[0] - before
    done.set()
    thread.join()
    assert during > 100, "it held the interpreter"


def test_the_time_of_all_matches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TOTAL_SECONDS", 0.0)
    with pytest.raises(AdapterConfigError, match="takes too long to match"):
        of("(q|v)").values("q")


def test_the_number_of_matches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_PAIRS", 5)
    compiled = of("q", "v", "k")
    compiled.values("q")
    with pytest.raises(AdapterConfigError, match=r"patterns times the modules .* more than 5;"):
        compiled.values("q")


def test_a_busy_service_has_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        tries = 0

        def match(self, *_: object, **options: object) -> bool:
            assert options == {"timeout": patterns.MATCH_SECONDS, "concurrent": True}
            self.tries += 1
            if self.tries == 1:
                raise TimeoutError
            return True

    monkeypatch.setattr(patterns.regex, "compile", lambda *_: Busy())
    assert of("(q|v)").values("q") == [0]


def test_names_need_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.regex, "compile", None)
    check_patterns([("rank_pattern", f"layers.{i}.self_attn.q_proj") for i in range(999)], FILE)
    assert of("layers.1.q-x_2").values("a.layers.1.q-x_2") == [0]


def test_ranks_by_pattern_of_an_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"r": 7, "rank_pattern": {r"blocks\.\d\.(q|v)": 2}}))
    assert {module.rank for module in read_adapter(folder).modules.values()} == {2}


@pytest.mark.parametrize("pattern", ["{}(q|v)", "{}(q|v)" + 100 * "(q|v)"])
def test_the_number_of_expressions_is_bounded(tmp_path: Path, pattern: str) -> None:
    count = 257 if len(pattern) < 9 else 50
    many = {pattern.replace("{}", str(i)): 2 for i in range(count)}
    folder = adapter(tmp_path, rank_pattern=many)
    with pytest.raises(AdapterConfigError, match=f"rank_pattern: the config has {count} regular"):
        read_adapter(folder)
