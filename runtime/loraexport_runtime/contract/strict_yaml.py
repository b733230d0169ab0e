"""YAML text -> plain data, the line of every value, and the keys given twice; and back.

Stricter than PyYAML: YAML 1.2 scalars, no tags, no merge keys, no duplicate keys. The runtime
itself reads none: the exporter's specs and the server's settings are, and both need PyYAML.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import MAX_QUOTED, LoraexportError, quoted, shorten
from .foreign import read_bounded

MAX_PROBLEMS = 20
"""Problems that a print lists: a screen of them. `problems` has all."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a file: `line` is 1-based, `path` like `adapters[1].name`."""

    line: int
    path: str
    message: str
    hint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", shorten(self.message))

    def __str__(self) -> str:
        where = f"{self.line}: " + (f"{self.path}: " if self.path else "")
        return shorten(where + self.message + (f" ({self.hint})" if self.hint else ""))


class ProblemsError(LoraexportError):
    """A file breaks its contract. `problems` lists everything found, in the file's order."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        source = shorten(source)
        lines = [f"{source}:{problem}" for problem in self.problems[:MAX_PROBLEMS]]
        if len(self.problems) > MAX_PROBLEMS:
            lines.append(f"… and {len(self.problems) - MAX_PROBLEMS:,} more")
        Exception.__init__(self, "\n".join(lines))  # each of them is short


Lines = dict[tuple[str | int, ...], int]
"""Where each value of a file stands: its path -> its 1-based line."""

_MAX_BYTES = 2**20
"""Of a file: a spec of 10,000 adapters has about as much."""
_MAX_VALUES = 50_000
"""Of a file, aliases written out: 16,000 adapters with a name and a path each."""
_TOO_MANY = f"more than {_MAX_VALUES:,} values, aliases written out"
_MAX_TEXT = 4 * 2**20
"""Characters of all values, aliases written out: a few times those of the largest file."""
_MAX_DEPTH = 64
"""Of values inside values; a spec's own have 6."""


class Format(NamedTuple):
    """A kind of file: what hints say of where there is one to see and where its keys are."""

    example: str
    keys: str
    error: type[ProblemsError]
    """What is raised for what is wrong with one."""
    name: str = "a spec"


def read_yaml(path: Path, kind: Format) -> tuple[Any, Lines, list[Problem]]:
    """The data of a YAML file, the line of every value, and the duplicate keys.

    Raises:
        ProblemsError: of the kind's own class: it cannot be read, or is no YAML.
    """
    source = str(path)
    try:
        text = read_bounded(path, _MAX_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        hint = f"give the path of {kind.example}"
        raise kind.error(source, [Problem(1, "", "no such file", hint)]) from error
    except UnicodeDecodeError as error:
        problem = Problem(1, "", f"not UTF-8 text: {error}", "save it as UTF-8")
        raise kind.error(source, [problem]) from error
    except OSError as error:
        hint = "give a YAML file that can be read"
        raise kind.error(source, [Problem(1, "", f"{error.strerror}", hint)]) from error
    try:
        loader = _StrictLoader(text, kind.name)
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        prefix = "" if isinstance(error, yaml.constructor.ConstructorError) else "not YAML: "
        raise kind.error(source, [Problem(line, "", f"{prefix}{error.problem}")]) from error
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise kind.error(source, [Problem(1, "", f"not YAML: {first}")]) from error
    except RecursionError as error:
        raise kind.error(source, [Problem(1, "", "not YAML: nested too deeply")]) from error
    if data is None:
        raise kind.error(source, [Problem(1, "", "the file is empty", kind.keys)])
    return data, loader.lines, loader.problems


def to_yaml(data: Any) -> str:
    """Data as text that `read_yaml` reads back alike."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dotted(location: Sequence[str | int]) -> str:
    """`("adapters", 1, "name")` as `adapters[1].name`."""
    text = ""
    for part in location:
        if isinstance(part, str):  # a key may be of any length, and hold a terminal's codes
            part = shorten(part if part.isprintable() else repr(part)[1:-1], MAX_QUOTED)
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars (`no` is text, 1e-5 is a number), duplicate keys noted, lines kept."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own form: a class attribute

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self._kind = kind
        self.lines: Lines = {(): 1}
        self.problems: list[Problem] = []
        self._num_nodes = 0
        self._num_values = 0
        self._num_characters = 0

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._walk(node, ())
        return self.construct_document(node)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node of the file as it stands, keys too; bounded, as each takes a while."""
        self._num_nodes += 1
        if self._num_nodes > 2 * _MAX_VALUES:
            raise _refused(parent, _TOO_MANY)
        return super().compose_node(parent, index)

    def _walk(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        self._num_values += 1
        if len(path) > _MAX_DEPTH:
            raise RecursionError
        if self._num_values > _MAX_VALUES:  # a few nested aliases make billions
            raise _refused(node, _TOO_MANY)
        self._check_node(node)
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._walk(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                self._check_node(key)
                name, line = str(key.value), key.start_mark.line + 1
                if name in seen:
                    message = f"duplicate key, first given on line {seen[name]}"
                    hint = "remove one of the two"
                    self.problems.append(Problem(line, dotted((*path, name)), message, hint))
                seen.setdefault(name, line)
                self.lines[(*path, name)] = line
                self._walk(value, (*path, name))

    def _check_node(self, node: yaml.Node) -> None:
        """Raise ConstructorError for what no such file can hold, or for too much text."""
        if not node.tag.startswith(_YAML_TAG) or node.tag.removeprefix(_YAML_TAG) not in _TAGS:
            tag = quoted(node.tag)
            raise _refused(node, f"tag {tag} is not allowed in {self._kind}; write the plain value")
        if not isinstance(node, yaml.ScalarNode):
            return
        self._num_characters += len(node.value)
        if self._num_characters > _MAX_TEXT:
            raise _refused(node, f"more than {_MAX_TEXT >> 20} MiB of text, aliases written out")
        if _NO_TEXT.search(node.value):
            value = quoted(node.value)
            raise _refused(node, f"{value} holds a NUL or half a character, which no name can")

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        """As its resolver reads it: `!!bool no` is none."""
        value = self.construct_scalar(node)
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{quoted(value)} is neither true nor false")
        return value.lower() == "true"

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, always: YAML 1.1 reads 010 as eight."""
        return int(self.construct_scalar(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node))


def _refused(node: yaml.Node | None, message: str) -> yaml.constructor.ConstructorError:
    mark = node.start_mark if node else None
    return yaml.constructor.ConstructorError(None, None, message, mark)


class _Dumper(yaml.SafeDumper):
    """Quotes text that _StrictLoader or another YAML reader would take for something else."""


_YAML_TAG = "tag:yaml.org,2002:"
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
_TAGS = ("map", "seq", "str", "null", "bool", "int", "float")
for _tag, _pattern, _first in (
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(_YAML_TAG + _tag, re.compile(_pattern), _first)
_StrictLoader.add_constructor(_YAML_TAG + "bool", _StrictLoader.construct_yaml_bool)
_StrictLoader.add_constructor(_YAML_TAG + "int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor(_YAML_TAG + "float", _StrictLoader.construct_yaml_float)
