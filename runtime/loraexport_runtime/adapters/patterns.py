"""Regular expressions out of adapter files -> whether they name a module, in bounded time.

PEFT matches them with `re`, whose matching has no bound. Here every pattern is one of `re`'s,
bounded in size, and matched by an engine that stops after a time and holds up no other thread.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

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


class ModulePatterns(Generic[_T]):
    """Values by pattern, as rank_pattern and alpha_pattern have them.

    PEFT's rule: a pattern is the module's whole name, or what follows one of its dots; the first in
    the file's order that names the module gives the value.
    """

    def __init__(self, values: Mapping[str, _T], file: Path, field: str) -> None:
        """Raises AdapterConfigError: a pattern is none."""
        self._where = f"{file}: {field}"
        self._values = [
            (pattern, value, None if _PLAIN.fullmatch(pattern) else self._compiled(pattern))
            for pattern, value in values.items()
        ]
        self._seconds = TOTAL_SECONDS
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
            for pattern, value, compiled in self._values
            if (
                _is_named(pattern, module)
                if compiled is None
                else self._matches(pattern, compiled, module)
            )
        ]

    def _compiled(self, pattern: str) -> "regex.Pattern[str]":
        return _compile(pattern, self._where, r"(.*\.)?(", ")$")

    def _matches(self, pattern: str, compiled: "regex.Pattern[str]", module: str) -> bool:
        start = time.thread_time()
        try:
            is_match = _match(compiled, module)
        except TimeoutError as error:
            raise self._too_slow(pattern, module) from error
        self._seconds -= time.thread_time() - start
        if self._seconds < 0:
            raise self._too_slow(pattern, module)
        return is_match

    def _too_slow(self, pattern: str, module: str) -> AdapterConfigError:
        return AdapterConfigError(
            f"{self._where}: {quoted(pattern)} takes too long to match with {quoted(module)}: it"
            " repeats what already repeats; write it without, or name the modules"
        )


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


def _match(compiled: "regex.Pattern[str]", module: str) -> bool:
    """Other threads run meanwhile. Raises TimeoutError."""
    for last in (False, True):
        try:
            return bool(compiled.match(module, timeout=MATCH_SECONDS, concurrent=True))
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
