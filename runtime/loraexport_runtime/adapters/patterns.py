"""Regular expressions out of adapter files -> whether they name a module, in bounded time.

PEFT matches them with `re`, whose matching has no bound. Here every pattern is one of `re`'s,
bounded in size, and matched by an engine that stops after a time and holds up no other thread.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import regex

from ..errors import AdapterConfigError, quoted

MAX_LENGTH = 10_000
"""Characters of a pattern: the longest that tools write (a list of a model's modules) have 2,000"""
MAX_EXPRESSIONS = 256
"""Of one config, names left out; tools write a few."""
MAX_REPEATS = 10_000
"""Of the counts in a pattern, multiplied: what stands in `{…}` is compiled as often."""
MAX_PAIRS = 10_000_000
"""Patterns times modules: 3,000 modules with a rank each; about two seconds."""
MATCH_SECONDS = 0.05
"""Of one match, which takes some microseconds."""
TOTAL_SECONDS = 2.0
"""Of all matches of one adapter, as this thread's own time."""
_T = TypeVar("_T")
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_COMPILE_ERRORS = (re.error, regex.error, OverflowError, RecursionError, FutureWarning)


def check_patterns(patterns: Iterable[tuple[str, str]], file: Path) -> None:
    """Raise AdapterConfigError unless patterns are ones that `re` takes, few and of bounded size.

    Args:
        patterns: field and pattern of each; names, which stand for themselves, may be many.
    """
    expressions = [(field, text) for field, text in patterns if not _PLAIN.fullmatch(text)]
    size = sum(len(text) for _, text in expressions)
    if len(expressions) > MAX_EXPRESSIONS or size > 2 * MAX_LENGTH:
        raise AdapterConfigError(
            f"{file}: {expressions[0][0]}: the config has {len(expressions):,} regular expressions"
            f" with {size:,} characters, beyond {MAX_EXPRESSIONS} or {2 * MAX_LENGTH:,}, which"
            " would take long to compile; name the modules"
        )
    for field, text in expressions:
        _compile(text, f"{file}: {field}")


class Clock:
    """The time that the patterns of one adapter may take together."""

    def __init__(self) -> None:
        self._seconds = TOTAL_SECONDS

    def match(
        self, pattern: "Pattern", module: str, *, whole: bool = False
    ) -> "regex.Match[str] | None":
        """Match in bounded time; other threads run meanwhile.

        Args:
            whole: the pattern is all of the name, and not how it begins.

        Raises:
            AdapterConfigError: it takes too long.
        """
        start = time.thread_time()
        found = None
        try:
            found = _match(pattern.compiled, module, whole)
        except TimeoutError as error:
            raise pattern.too_slow(module) from error
        self._seconds -= time.thread_time() - start
        if self._seconds < 0:
            raise pattern.too_slow(module)
        return found


class Pattern:
    """One regular expression out of a config."""

    def __init__(self, text: str, where: str, ahead: str = "", behind: str = "") -> None:
        """
        Args:
            where: the file and the field.
            ahead: what stands before it, and behind it.

        Raises:
            AdapterConfigError: it is none that can be used.
        """
        self._text, self._where = text, where
        self.compiled = _compile(text, where, ahead, behind)

    def too_slow(self, module: str) -> AdapterConfigError:
        """The error of one that takes too long."""
        return AdapterConfigError(
            f"{self._where}: {quoted(self._text)} takes too long to match with {quoted(module)}: it"
            " repeats what already repeats; write it without, or name the modules"
        )


class ModulePatterns(Generic[_T]):
    """Values by pattern, as rank_pattern and alpha_pattern have them.

    PEFT's rule: a pattern is the module's whole name, or what follows one of its dots; the first in
    the file's order that names the module gives the value.
    """

    def __init__(self, values: Mapping[str, _T], file: Path, field: str) -> None:
        """Raises AdapterConfigError: a pattern is none."""
        self._where = f"{file}: {field}"
        self._values = [
            (
                text,
                value,
                None if _PLAIN.fullmatch(text) else Pattern(text, self._where, r"(.*\.)?(", ")$"),
            )
            for text, value in values.items()
        ]
        self._clock = Clock()
        self._pairs = MAX_PAIRS

    def value(self, module: str, default: _T) -> _T:
        """The value of the first pattern that names the module."""
        return next(iter(self.values(module)), default)

    def values(self, module: str) -> list[_T]:
        """The values of every pattern that names the module.

        Raises:
            AdapterConfigError: there are too many to try, or one takes too long.
        """
        self._pairs -= len(self._values)
        if self._pairs < 0:
            raise AdapterConfigError(
                f"{self._where}: its patterns times the modules of this adapter are more than"
                f" {MAX_PAIRS:,}; write fewer patterns"
            )
        return [
            value
            for text, value, pattern in self._values
            if (
                _is_named(text, module)
                if pattern is None
                else self._clock.match(pattern, module) is not None
            )
        ]


class Scalings:
    """Rank and scaling of every module, by a config's fields and patterns."""

    def __init__(self, config: Mapping[str, Any], file: Path) -> None:
        self._config = config
        self._ranks = ModulePatterns[int](config["rank_pattern"], file, "rank_pattern")
        self._alphas = ModulePatterns[float](config["alpha_pattern"], file, "alpha_pattern")

    def rank(self, module: str) -> int:
        return self._ranks.value(module, self._config["r"])

    def num_ranks(self, module: str) -> int:
        """How many patterns give it one."""
        return len(self._ranks.values(module))

    def scaling(self, module: str, rank: int) -> float:
        alpha = self._alphas.value(module, self._config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self._config["use_rslora"] else rank)


def _is_named(pattern: str, module: str) -> bool:
    """Whether a pattern of plain letters names a module; its dots stand for any letter."""
    size = len(pattern)
    if len(module) < size or (len(module) > size and module[-size - 1] != "."):
        return False
    tail = module[-size:]
    return tail == pattern or (
        "." in pattern
        and all(sign in (".", letter) for sign, letter in zip(pattern, tail, strict=True))
    )


def _match(compiled: "regex.Pattern[str]", module: str, whole: bool) -> "regex.Match[str] | None":
    """Raises TimeoutError."""
    match = compiled.fullmatch if whole else compiled.match
    for last in (False, True):
        try:
            return match(module, timeout=MATCH_SECONDS, concurrent=True)
        except TimeoutError:
            # The engine's clock counts what all threads use: a busy service has a second try.
            if last:
                raise
    raise AssertionError


def _compile(pattern: str, where: str, ahead: str = "", behind: str = "") -> "regex.Pattern[str]":
    problem = _problem(pattern)
    if not problem:
        try:
            re.compile(ahead + pattern + behind)
            return regex.compile(ahead + pattern + behind, regex.VERSION0)
        except _COMPILE_ERRORS as error:
            problem = str(error)
    raise AdapterConfigError(
        f"{where}: {quoted(pattern)} is no regular expression that can be used: {problem}"
    )


def _problem(pattern: str) -> str:
    """What is refused before it is compiled; empty if nothing is."""
    if len(pattern) > MAX_LENGTH:
        return f"it has more than {MAX_LENGTH:,} characters"
    if not (pattern.isascii() and pattern.isprintable()):
        return "it has characters that no module's name has"
    if re.search(r"\\[uUN]|\[[:.=]", pattern):
        return "it has characters by number or class, which no module's name needs"
    plain = re.sub(r"\\.", "", pattern)
    counts = [match for match in _COUNT.finditer(plain) if match[0] not in ("{}", "{,}")]
    if plain.count("{") != len(counts):
        return "{ stands for itself: write \\{"
    numbers = [int(number[:9]) for match in counts for number in (match[1], match[3]) if number]
    if math.prod(max(number, 1) for number in numbers) > MAX_REPEATS:
        return f"its counts in {{}} multiply to more than {MAX_REPEATS:,}"
    return ""
