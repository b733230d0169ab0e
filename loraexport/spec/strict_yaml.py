"""YAML text -> plain data, the line of every value, and the keys given twice; and back.

Stricter than PyYAML: YAML 1.2 scalars, no tags, no merge keys, no duplicate keys.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import Problem, SpecError

Lines = dict[tuple[str | int, ...], int]
"""Where each value of a file stands: its path -> its 1-based line."""

_MAX_VALUES = 100_000


class Format(NamedTuple):
    """What hints say of a kind of file: where there is one to see, and where its keys are."""

    example: str
    keys: str


SPEC = Format("a spec, as specs/quickstart.yaml", "'loraexport schema' lists the keys")


def read_yaml(path: Path, kind: Format = SPEC) -> tuple[Any, Lines, list[Problem]]:
    """The data of a YAML file, the line of every value, and the duplicate keys."""
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = f"give the path of {kind.example}"
        raise SpecError(source, [Problem(1, "", "no such file", hint)]) from error
    except UnicodeDecodeError as error:
        problem = Problem(1, "", f"not UTF-8 text: {error}", "save it as UTF-8")
        raise SpecError(source, [problem]) from error
    except OSError as error:
        hint = "give a YAML file that can be read"
        raise SpecError(source, [Problem(1, "", f"{error.strerror}", hint)]) from error
    try:
        loader = _StrictLoader(text)
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        prefix = "" if isinstance(error, yaml.constructor.ConstructorError) else "not YAML: "
        raise SpecError(source, [Problem(line, "", f"{prefix}{error.problem}")]) from error
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise SpecError(source, [Problem(1, "", f"not YAML: {first}")]) from error
    except RecursionError as error:
        raise SpecError(source, [Problem(1, "", "not YAML: nested too deeply")]) from error
    if data is None:
        raise SpecError(source, [Problem(1, "", "the file is empty", kind.keys)])
    return data, loader.lines, loader.problems


def to_yaml(data: Any) -> str:
    """Data as text that `read_yaml` reads back alike."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dotted(location: Sequence[str | int]) -> str:
    """`("adapters", 1, "name")` as `adapters[1].name`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars (`no` is text, 1e-5 is a number), duplicate keys noted, lines kept."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own form: a class attribute

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: Lines = {(): 1}
        self.problems: list[Problem] = []
        self._num_values = 0

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._walk(node, ())
        return self.construct_document(node)

    def _walk(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:  # a few nested aliases make billions
            message = f"more than {_MAX_VALUES:,} values, aliases written out"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        if not node.tag.startswith(_YAML_TAG) or node.tag.removeprefix(_YAML_TAG) not in _TAGS:
            message = f"tag {node.tag!r} is not allowed in a spec; write the plain value"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._walk(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in seen:
                    message = f"duplicate key, first given on line {seen[name]}"
                    hint = "remove one of the two"
                    self.problems.append(Problem(line, dotted((*path, name)), message, hint))
                seen.setdefault(name, line)
                self.lines[(*path, name)] = line
                self._walk(value, (*path, name))

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, always: YAML 1.1 reads 010 as eight."""
        return int(self.construct_scalar(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Quotes text that _StrictLoader or another YAML reader would take for something else."""


_YAML_TAG = "tag:yaml.org,2002:"
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
_StrictLoader.add_constructor(_YAML_TAG + "int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor(_YAML_TAG + "float", _StrictLoader.construct_yaml_float)
