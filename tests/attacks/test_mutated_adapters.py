"""Adapter folders that are mutated, or not files at all: taken or refused by name, and at once.

Seeded; a finding becomes a case of its own. `LORAEXPORT_MUTATIONS` sets another number of them.
"""

import json
import os
import random
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.adapters import write_adapter
from support.peft_adapters import SITES

from loraexport_runtime.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.tensors import read_lora_weights, read_saved_weights
from loraexport_runtime.errors import LoraexportError

COUNT = int(os.environ.get("LORAEXPORT_MUTATIONS", "150"))
SECONDS = 5.0
ROOM = 2 * 2**30
"""Bytes of address space beyond what the process has."""


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Callable[[random.Random], Any]] = [
    lambda chance: None,
    lambda chance: chance.choice([True, False]),
    lambda chance: chance.choice([0, -1, 2**31, 2**63, -(2**64), 10**400, 10**4000]),
    lambda chance: chance.choice([0.0, -1.5, 1e308, 1e-320, float("nan"), float("inf")]),
    lambda chance: chance.choice(
        ["", "q", "\0", "\ud800", "../../etc", "(", "((.+)+)+!", "a{9}" * 9]
    ),
    lambda chance: "x" * chance.choice([300, 100_000]),
    lambda chance: chance.choice([[], ["q"], [""], [None], ["v"] * 5_000]),
    lambda chance: nested(chance.choice([1, 100, 900])),
    lambda chance: {},
    lambda chance: {chance.choice(["q", "((.+)+)+!", "(?:x{999}){999}", "[", ""]): 4},
    lambda chance: {f"layers.{i}.(q|v)": 2 for i in range(2_000)},
]


def change(value: Any, chance: random.Random) -> Any:
    """Another value somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        deed = chance.random()
        if deed < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if deed < 0.2:
            return value | {key[: len(key) // 2] + chance.choice("\0.é(*"): value[key]}
        return value | {key: change(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        index = chance.randrange(len(value))
        return [*value[:index], change(value[index], chance), *value[index + 1 :]]
    return chance.choice(VALUES)(chance)


def flip(data: bytes, chance: random.Random) -> bytes:
    """Some bytes are others, gone or doubled."""
    text = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 20])):
        place = chance.randrange(len(text))
        deed = chance.random()
        if deed < 0.6:
            text[place] = chance.randrange(256)
        elif deed < 0.8:
            del text[place : place + chance.choice([1, 9, 1_000])]
        else:
            text[place:place] = text[place : place + 40]
        if not text:
            return b""
    return bytes(text)


def mutate_config(folder: Path, chance: random.Random) -> None:
    file = folder / CONFIG_FILE
    if chance.random() < 0.3:
        file.write_bytes(flip(file.read_bytes(), chance))
        return
    config = json.loads(file.read_text())
    config |= {"target_modules": ["q"], "rank_pattern": {"q": 2}, "modules_to_save": ["head"]}
    for _ in range(chance.choice([1, 2])):
        config = change(config, chance)
    file.write_text(json.dumps(config))


def mutate_header(folder: Path, chance: random.Random) -> None:
    file = folder / WEIGHTS_FILE
    data = file.read_bytes()
    length = int(struct.unpack("<Q", data[:8])[0])
    text = data[8 : 8 + length]
    if chance.random() < 0.4:
        text = flip(text, chance)
    else:
        text = json.dumps(change(json.loads(text), chance)).encode()
    size = chance.choice([len(text)] * 8 + [0, 2**63])
    file.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])


@contextmanager
def bounded() -> Iterator[None]:
    """Neither long nor large."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < SECONDS


def read_whole(folder: Path) -> None:
    """Refused with a sentence, or read."""
    message = str(folder)
    with bounded():
        try:
            header = read_adapter(folder)
            read_lora_weights(header)
            read_saved_weights(header)
        except LoraexportError as error:
            message = str(error)
    assert str(folder) in message
    assert len(message.encode()) <= 3 * 2_000


@pytest.mark.parametrize("mutate", [mutate_config, mutate_header])
def test_mutations(tmp_path: Path, mutate: Callable[[Path, random.Random], None]) -> None:
    folder = write_adapter(tmp_path / "adapter", SITES, rank=2)
    whole = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for seed in range(COUNT):
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        mutate(folder, random.Random(seed))
        try:
            read_whole(folder)
        except BaseException as error:
            error.add_note(f"{mutate.__name__}, seed {seed}")
            raise


def header_of(entry: str, count: int) -> bytes:
    """A header of many entries, and no data."""
    text = "{" + ",".join(entry.format(i) for i in range(count)) + "}"
    return struct.pack("<Q", len(text)) + text.encode()


def config_of(**fields: object) -> bytes:
    return json.dumps({"peft_type": "LORA", **fields}).encode()


EMPTY = '"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a_header_of_many_tensors": (WEIGHTS_FILE, lambda: header_of(EMPTY, 300_000)),
    "a_header_of_small_objects": (WEIGHTS_FILE, lambda: header_of('"{}":{{}}', 2_000_000)),
    "a_header_of_numbers": (WEIGHTS_FILE, lambda: header_of('"{}":1', 3_000_000)),
    "a_deep_header": (
        WEIGHTS_FILE,
        lambda: struct.pack("<Q", 200_006) + b'{"a":' + b"[" * 200_001,
    ),
    "a_deep_config": (CONFIG_FILE, lambda: b'{"peft_type":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a_config_of_many_patterns": (
        CONFIG_FILE,
        lambda: config_of(rank_pattern={f"{i}(q|v)": 2 for i in range(99_999)}),
    ),
    "a_config_of_5_MiB": (CONFIG_FILE, lambda: config_of() + b" " * 5 * 2**20),
    "a_long_number": (
        CONFIG_FILE,
        lambda: b'{"peft_type": "LORA", "r": ' + b"9" * 100_000 + b"}",
    ),
    "many_modules_to_save": (CONFIG_FILE, lambda: config_of(modules_to_save=["x"] * 300_000)),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_ones(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "adapter", SITES, rank=2)
    file, make = LARGE[name]
    (folder / file).write_bytes(make())
    with pytest.raises(LoraexportError, match=file), bounded():
        read_adapter(folder)


def test_a_sparse_file(tmp_path: Path) -> None:
    """What its header promises, it does not have to hold."""
    folder = write_adapter(tmp_path / "adapter", SITES, rank=2)
    prefix = "base_model.model.blocks.0.q.lora_"
    size = 2**40
    tensors = {
        f"{prefix}A.weight": {"dtype": "F32", "shape": [2, 2**36], "data_offsets": [0, size // 2]},
        f"{prefix}B.weight": {
            "dtype": "F32",
            "shape": [2**36, 2],
            "data_offsets": [size // 2, size],
        },
    }
    text = json.dumps(tensors).encode()
    file = folder / WEIGHTS_FILE
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        os.truncate(file, 8 + len(text) + size)
    except OSError:
        pytest.skip("this file system has no sparse files of 1 TiB")
    header = read_adapter(folder)
    with pytest.raises(LoraexportError, match=r"does not fit into memory|is larger"), bounded():
        read_lora_weights(header)


def fifo(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def memory(file: Path) -> None:
    file.symlink_to("/proc/self/mem")  # a regular file that no read succeeds on


def unix_socket(file: Path) -> None:
    opened = socket.socket(socket.AF_UNIX)
    folder = os.open(file.parent, os.O_RDONLY)  # a path may be longer than a socket's
    opened.bind(f"/proc/self/fd/{folder}/{file.name}")
    opened.close()
    os.close(folder)


def circle(file: Path) -> None:
    file.symlink_to(file.name)


def directory(file: Path) -> None:
    file.mkdir()


def dangling(file: Path) -> None:
    file.symlink_to("nowhere")


@pytest.mark.parametrize("make", [fifo, device, memory, unix_socket, circle, directory, dangling])
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("at_rest", [False, True])
def test_what_is_no_file(
    tmp_path: Path, make: Callable[[Path], None], name: str, at_rest: bool
) -> None:
    folder = write_adapter(tmp_path / "adapter", SITES, rank=2)
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(LoraexportError, match=rf"{name}: "), bounded():
        read_adapter(folder, at_rest=at_rest)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5_000, "/".join(["y"] * 3_000)])
def test_paths_that_no_file_has(tmp_path: Path, path: str) -> None:
    for at_rest in (False, True):
        with pytest.raises(LoraexportError, match="adapter_config"):
            read_adapter(tmp_path / path, at_rest=at_rest)


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    """As a hub's cache has them."""
    folder = write_adapter(tmp_path / "adapter", SITES, rank=2)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert read_lora_weights(read_adapter(folder, at_rest=True))
