"""A PEFT folder that is overwritten while a service loads it: one version or an error."""

import io
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.adapters import write_adapter

import loraexport_runtime as lr
from loraexport_runtime.adapters import files
from loraexport_runtime.adapters.files import CONFIG_FILE, WEIGHTS_FILE, digest_adapter
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.tensors import AdapterContent, read_lora_weights

SITES = {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)}
X = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)


def in_place(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def renamed(source: Path, target: Path) -> None:
    beside = target.with_suffix(".new")
    beside.write_bytes(source.read_bytes())
    os.replace(beside, target)


@pytest.fixture
def versions(tmp_path: Path) -> list[Path]:
    """Of the same shapes, with other weights and another alpha."""
    return [
        write_adapter(tmp_path / f"v{i}", SITES, rank=3, seed=i, alpha=8 * (i + 1))
        for i in range(2)
    ]


@pytest.mark.parametrize("write", [in_place, renamed])
def test_one_version_or_an_error(
    tenants: Path, tmp_path: Path, versions: list[Path], write: Callable[[Path, Path], None]
) -> None:
    with lr.load_layers(tenants, threads=1) as session:
        by_digest, seen, late = {}, set(), set()
        for config, weights in itertools.product(versions, repeat=2):
            mixed = tmp_path / "mixed"
            mixed.mkdir(exist_ok=True)
            in_place(config / CONFIG_FILE, mixed / CONFIG_FILE)
            in_place(weights / WEIGHTS_FILE, mixed / WEIGHTS_FILE)
            session.load_adapter("new", mixed)
            y = session["up"].run(X, segments=[("new", 4)]).tobytes()
            by_digest[digest_adapter(mixed)] = y
        folder = write_adapter(tmp_path / "new", SITES, rank=3, seed=0, alpha=8)
        done = threading.Event()

        def overwrite() -> None:
            chance = random.Random(1)
            for version in itertools.cycle(versions):
                if done.is_set():
                    return
                first, second = chance.sample([CONFIG_FILE, WEIGHTS_FILE], 2)
                start = time.monotonic()
                write(version / first, folder / first)
                between = digest_adapter(folder)
                time.sleep(0.01)
                write(version / second, folder / second)
                if time.monotonic() - start > files.REST_SECONDS / 2:
                    late.add(between)  # a busy machine: for so long it was the folder's state
                time.sleep(0.01)
                time.sleep(chance.choice([0, 0.08]))

        writer = threading.Thread(target=overwrite)
        writer.start()
        loads, tries, chance_of_load = 0, 0, random.Random(2)
        try:
            while loads < 30 and tries < 2_000:
                tries += 1
                time.sleep(chance_of_load.uniform(0, 0.03))
                try:
                    session.load_adapter("new", folder)
                except (lr.AdapterError, lr.WeightsError):
                    continue  # what was there before goes on
                finally:
                    y = session["up"].run(X, segments=[("new", 4)]).tobytes()
                    digest = session.list_adapters()["new"].digest
                    assert y == by_digest[digest]
                    seen.add(digest)
                loads += 1
        finally:
            done.set()
            writer.join()
        assert loads == 30, "between two saves it can be loaded"
        assert seen <= late | {digest_adapter(version) for version in versions}
        session.load_adapter("new", folder)  # once it is at rest
        assert session.list_adapters()["new"].digest == digest_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("write", [in_place, renamed])
def test_a_change_between_header_and_tensors(
    versions: list[Path], name: str, write: Callable[[Path, Path], None]
) -> None:
    header = read_adapter(versions[0], at_rest=True)
    write(versions[1] / name, versions[0] / name)
    for read in (AdapterContent, read_lora_weights):
        with pytest.raises(lr.AdapterError, match=rf"{name}: it changed while the adapter was re"):
            read(header)


def test_a_change_before_the_header(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are replaced after the config was read."""
    read_config = files.AdapterFiles.read_config

    def replace_weights(self: files.AdapterFiles) -> bytes:
        config = read_config(self)
        in_place(versions[1] / WEIGHTS_FILE, versions[0] / WEIGHTS_FILE)
        return config

    monkeypatch.setattr(files.AdapterFiles, "read_config", replace_weights)
    with pytest.raises(lr.AdapterError, match=r"safetensors: it changed while the adapter was"):
        read_adapter(versions[0], at_rest=True)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_is_written_to_while_it_is_read(
    versions: list[Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What was read of it may be of either version: no later look is needed to refuse it."""
    header = read_adapter(versions[0], at_rest=True)

    class Written(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            content = super().read(size)
            in_place(versions[1] / name, versions[0] / name)
            return content

    open_regular = files.open_regular

    def open_written(file: Path) -> io.BufferedReader:
        opened = open_regular(file)
        return Written(opened.detach()) if file.name == name else opened  # type: ignore[arg-type]

    monkeypatch.setattr(files, "open_regular", open_written)
    reads = {CONFIG_FILE: header.files.read_config, WEIGHTS_FILE: header.files.read_weights}
    with pytest.raises(lr.AdapterError, match=rf"{name}: it changed while the adapter was read"):
        reads[name]()


def test_a_file_that_is_cut_while_it_is_read(
    versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was mapped would end the process (SIGBUS)."""
    header = read_adapter(versions[0])
    os.truncate(versions[0] / WEIGHTS_FILE, 100)
    with pytest.raises(lr.AdapterError, match="it changed while the adapter was read"):
        AdapterContent(header)
    with pytest.raises(lr.WeightsError, match="not a whole safetensors file"):
        read_adapter(versions[0])


def test_half_a_save_is_waited_for(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REST_SECONDS", 1.0)  # so that a busy machine is no slow save
    in_place(versions[1] / WEIGHTS_FILE, versions[0] / WEIGHTS_FILE)
    config = threading.Timer(
        files.REST_SECONDS / 10, in_place, (versions[1] / CONFIG_FILE, versions[0] / CONFIG_FILE)
    )
    config.start()
    header = read_adapter(versions[0], at_rest=True)
    config.join()
    assert AdapterContent(header).digest == digest_adapter(versions[1])


def test_files_that_never_rest(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REST_SECONDS", 1e6)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.raises(lr.AdapterError, match=r"v0: its files keep changing.* renaming a folder"):
        read_adapter(versions[0], at_rest=True)


def test_a_clock_that_is_ahead(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file server: nobody waits until then."""
    os.utime(versions[0] / CONFIG_FILE, (2e9, 2e9))
    monkeypatch.setattr(files.time, "sleep", None)
    assert read_adapter(versions[0], at_rest=True).modules


def test_the_digest_is_of_what_was_read(versions: list[Path]) -> None:
    header = read_adapter(versions[0])
    assert AdapterContent(header).digest == header.files.digest() == digest_adapter(versions[0])
