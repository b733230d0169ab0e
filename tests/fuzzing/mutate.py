"""A seed and a folder -> the folder with something wrong in it, and a line that says what."""

import contextlib
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

CODE = "intruder.py"
"""A file that a mutated folder holds: running it leaves the canary."""
_SPARSE = 1 << 33
_LONG = 100_000
_KEYS = (
    "auto_map",
    "custom_ops_library",
    "quantization_config",
    "trust_remote_code",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_modules",
    "_name_or_path",
    "tokenizer_class",
    "include",
    "\0",
)
_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda draw: None,
    lambda draw: True,
    lambda draw: "",
    lambda draw: [],
    lambda draw: {},
    lambda draw: 0,
    lambda draw: -1,
    lambda draw: draw.choice((2**15, 2**31, 2**40, 2**63, 10**30, 10**400, _Raw("9" * 9000))),
    lambda draw: draw.choice((0.5, -1e-9, 1e308, float("inf"), float("nan"))),
    lambda draw: draw.choice(("x", "null", "../../etc/passwd", "/dev/zero", "a\0b", "é" * 9)),
    lambda draw: "x" * _LONG,
    lambda draw: [0] * draw.choice((2, 1000)),
    lambda draw: {"a": {"b": {"c": []}}},
    lambda draw: {"((.+)+)+!": 4, "(": 2, "(a|a)*$": 1},
    lambda draw: "((.+)+)+!",
    lambda draw: {"AutoConfig": "intruder.Intruder", "AutoModel": "intruder.Intruder"},
    lambda draw: _nest(draw.choice((50, 900, 20_000))),
)


_TEMPLATES = (
    "",
    "{%",
    "{% for message in messages %}",
    "{{ messages[0]['content'].replace('h', 'x') }}",
    "{{ messages[9]['content'] }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{{ 'x' * 1000000 }}",
    "{{ 1 // 0 }}",
    "{{ messages | tojson(indent=9999999) }}",
    "{% macro m(n) %}{{ n }}{% endmacro %}{{ m(m) }}",
    "{{ strftime_now('%Y' * 9999) }}",
    "(" * 5_000,
    "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "{% if true %}" * 500 + "{% endif %}" * 500,
    "<s>" * 5_000,
)
"""Chat templates that fail, ask for much, or say nothing."""


def mutate(folder: Path, draw: random.Random, names: Collection[str] = ()) -> str:
    """Change one to three things in the files of a folder; say what.

    Args:
        names: the files that are changed; none: all.
    """
    (folder / CODE).write_text(
        "import os, pathlib\npathlib.Path(os.environ['CANARY']).touch()\nclass Intruder: pass\n"
    )
    count = draw.choice((1, 1, 1, 2, 3))
    return "; ".join(_mutate_file(folder, draw, names) for _ in range(count))


def _mutate_file(folder: Path, draw: random.Random, names: Collection[str]) -> str:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.name != CODE
        and (not names or path.name in names)
        and path.is_file()
        and not path.is_symlink()  # /proc/self/mem is a regular file
        and path.stat().st_size < _SPARSE
    )
    if not files:
        return "no file is left"
    file = draw.choice(files)
    way = draw.choice((_mutate_values, _mutate_values, _mutate_bytes, _mutate_bytes, _replace))
    return f"{file.relative_to(folder)}: {way(file, draw)}"


def _mutate_values(file: Path, draw: random.Random) -> str:
    """One value of a JSON file or of a safetensors header, a whole template; elsewhere bytes."""
    data = file.read_bytes()
    if file.suffix == ".jinja":
        index = draw.randrange(len(_TEMPLATES))
        file.write_text(_TEMPLATES[index], encoding="utf-8")
        return f"template {index}"
    if file.suffix == ".safetensors" and len(data) > 8:
        length = int.from_bytes(data[:8], "little")
        with contextlib.suppress(ValueError, RecursionError):
            text, said = _mutate_json(json.loads(data[8 : 8 + length]), draw)
            header = text.encode("utf-8", "surrogatepass")
            file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
            return f"header {said}"
    if file.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):
            text, said = _mutate_json(json.loads(data), draw)
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            return said
    return _mutate_bytes(file, draw)


def _mutate_json(value: Any, draw: random.Random) -> tuple[str, str]:
    places = list(_places(value))
    if not places:
        return _dump(draw.choice(_VALUES)(draw)), "the whole value"
    holder, key, path = draw.choice(places)
    way = draw.choice(("value", "value", "value", "delete", "copy", "key"))
    if way == "delete":
        del holder[key]
    elif way == "copy":
        other, name, _ = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    elif way == "key" and isinstance(holder, dict):
        holder[draw.choice(_KEYS)] = draw.choice(_VALUES)(draw)
    else:
        holder[key] = draw.choice(_VALUES)(draw)
    return _dump(value), f"{path[:80]}: {way}"


def _places(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every container with a key of it."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key, f"{path}/{key}"
            yield from _places(item, f"{path}/{key}")


class _Raw(str):
    """JSON text as it is, deeper than `json` writes."""


def _nest(depth: int) -> _Raw:
    return _Raw("[" * depth + "]" * depth)


def _dump(value: Any) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


def _mutate_bytes(file: Path, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    size = len(data)
    way = draw.choice(("flip", "flip", "cut", "double", "insert", "drop", "numbers"))
    place = draw.randrange(size) if size else 0
    if way == "flip" and size:
        data[place] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del data[place:]
    elif way == "double":
        data += bytes(data)
    elif way == "insert":
        data[place:place] = draw.choice(
            (b"\0", b"\xff\xfe", b"\n", b"{", b"&a [*a]", b"!!python/object/apply:os.getcwd []\n")
        )
    elif way == "drop":
        del data[place : place + draw.choice((1, 8, 64))]
    else:
        digits = [index for index, byte in enumerate(data[:_LONG]) if chr(byte).isdigit()]
        if digits:
            data[draw.choice(digits)] = ord(draw.choice("0123456789-"))
    file.write_bytes(data)
    return f"{way} at {place}"


def _replace(file: Path, draw: random.Random) -> str:
    """Something else under the file's name, or nothing."""
    content = file.read_bytes()
    file.unlink()
    ways = ("nothing", "empty", "folder", "fifo", "device", "outside", "loop", "socket", "sparse")
    way = draw.choice(ways)
    if way == "empty":
        file.touch()
    elif way == "folder":
        file.mkdir()
    elif way == "fifo":
        os.mkfifo(file)
    elif way == "device":
        file.symlink_to(draw.choice(("/dev/zero", "/dev/stdin", "/proc/self/mem")))
    elif way == "outside":
        outside = file.parent.parent / f"outside-{file.name}"
        outside.write_bytes(content)
        file.symlink_to(outside)
    elif way == "loop":
        file.symlink_to(file.name)
    elif way == "socket":
        _bind(file)
    elif way == "sparse":
        with file.open("wb") as opened:
            opened.truncate(_SPARSE)
    return way


def _bind(file: Path) -> None:
    """A socket under a short name: a path in a socket's address has at most 107 bytes."""
    short = Path("/tmp") / f"loraexport-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(short))
    shutil.move(short, file)
