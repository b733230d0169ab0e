"""A full disk: one readable block that names the path, exit code 1, and nothing is left."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.builds import write_one_layer

import loraexport
from loraexport import artifact as staging_module
from loraexport.artifact import staging
from loraexport.bench.results import read_results
from loraexport.bench.run import write_report
from loraexport.errors import DiskFullError, ExportError, ParityError, exit_code
from loraexport.pipeline import build as build_module

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file system of 24 KiB, mounted where only this build sees it."""
    spec, out = write_one_layer(tmp_path), tmp_path / "out"
    out.mkdir()
    mount = f"mount -t tmpfs -o size=24k tmpfs {out}"
    try_it = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount]
    if not shutil.which("unshare") or subprocess.run(try_it, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    build = f"{sys.executable} -m loraexport build {spec} --out {out}"
    script = f"{mount} && {build}; code=$?; ls -A {out}; exit $code"
    done = subprocess.run(
        [*try_it[:-1], script], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ".tiny.lock\n"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"DiskFullError: {out}/.tiny.staging-")
    assert "no space left on the device; nothing was published. Free some" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["spec.yaml", "graphs/q.ts", "parity/parity.json"])
def test_a_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """/dev/full in its place."""
    copy = build_module.copy_adapter

    def plant(adapter: Any, folder: Path) -> None:
        copy(adapter, folder)
        place = folder.parents[1] / name
        place.parent.mkdir(exist_ok=True)
        place.symlink_to("/dev/full")

    monkeypatch.setattr(build_module, "copy_adapter", plant)
    with pytest.raises(DiskFullError, match=r"staging-\d+.*: no space left on the device"):
        loraexport.build(write_one_layer(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".tiny.lock"]


def test_publishing_and_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_one_layer(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out/there"))

    with monkeypatch.context() as patch:
        patch.setattr(staging_module.Staging, "publish", fail)
        with pytest.raises(DiskFullError, match=r"out/there: no space left") as caught:
            loraexport.build(spec, tmp_path / "out")
    assert exit_code(caught.value) == 1
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(DiskFullError, match="no space left"):
        loraexport.build(spec, tmp_path / "other")


def test_what_means_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error stays what it is unless the disk explains it better."""
    with pytest.raises(PermissionError), staging(tmp_path, "a"):
        raise PermissionError(errno.EACCES, "denied")
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(staging_module.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ParityError), staging(tmp_path, "a"):
        raise ParityError("wrong numbers")
    with pytest.raises(DiskFullError), staging(tmp_path, "a"):
        raise ExportError("torch.jit failed: file write failed")
    with pytest.raises(DiskFullError), staging(tmp_path, "a"):
        raise ParityError("in the end") from FULL


def test_a_file_of_another_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec, results, a manifest that is verified now: the old one stays, and nothing beside."""

    def fill(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1])
        raise FULL  # as a write has it, which knows no path

    (tmp_path / "bench.json").write_text("old")
    results = read_results(Path(__file__).parents[2] / "docs/bench/bench.json")
    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(DiskFullError, match=r"bench\.json: no space left on the device") as caught:
        write_report(results, tmp_path)
    assert exit_code(caught.value) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert (tmp_path / "bench.json").read_text() == "old"
