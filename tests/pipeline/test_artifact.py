"""An artifact is whole or not there: publishing, two builds at once, and determinism."""

import fcntl
import json
import os
import re
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.builds import write_small, write_tenants
from support.processes import check_whole, left_over, read_until, start_build

from loraexport import artifact as artifact_module
from loraexport.artifact import mark_verified, staging
from loraexport.cli import app as cli
from loraexport.errors import BuildBusyError, ParityError, UsageError
from loraexport.pipeline.build import build
from loraexport_runtime.contract.files import MANIFEST_FILE, digest_file
from loraexport_runtime.contract.manifest import Manifest, ParitySummary
from loraexport_runtime.contract.seal import DIGEST_FILE

ROOT = Path(__file__).resolve().parents[2]


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    """`loraexport ARGUMENTS` in this process; gives the exit code."""
    monkeypatch.setattr(sys, "argv", ["loraexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return exit_info.value.code


class TestStaging:
    """What a build does with folders, without the build."""

    def test_nothing_is_seen_before_publish(self, small: Path, tmp_path: Path) -> None:
        with staging(tmp_path, "new") as stage:
            (stage.folder / "file").write_text("1")
            assert not (tmp_path / "new").exists()
            stage.publish(replace(Manifest.read(small), layers=(), adapters=()))
            assert list(check_whole(tmp_path / "new").files) == ["file"]
        assert left_over(tmp_path) == []

    def test_an_error_leaves_the_old_artifact(self, small: Path, tmp_path: Path) -> None:
        shutil.copytree(small, tmp_path / "tiny")
        with pytest.raises(FileNotFoundError), staging(tmp_path, "tiny") as stage:
            (stage.folder / "no folder/file").write_text("1")
        assert check_whole(tmp_path / "tiny") == Manifest.read(small)
        assert left_over(tmp_path) == []

    def test_publish_replaces_all_of_the_old_one(self, small: Path, tmp_path: Path) -> None:
        shutil.copytree(small, tmp_path / "tiny")
        with staging(tmp_path, "tiny") as stage:
            (stage.folder / "file").write_text("1")
            stage.publish(replace(Manifest.read(small), name="other", layers=(), adapters=()))
        assert check_whole(tmp_path / "tiny").name == "other"
        names = {path.name for path in (tmp_path / "tiny").iterdir()}
        assert names == {"file", MANIFEST_FILE, DIGEST_FILE}
        assert left_over(tmp_path) == []

    def test_a_file_is_hashed_once(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashed: list[str] = []

        def note(path: Path) -> str:
            hashed.append(path.name)
            return digest_file(path)

        monkeypatch.setattr("loraexport.artifact.digest_file", note)
        manifest = replace(Manifest.read(small), layers=(), adapters=())
        with staging(tmp_path, "new") as stage:
            (stage.folder / "graph").write_text("1")
            assert list(stage.list_files(manifest).files) == ["graph"]
            (stage.folder / "report").write_text("2")
            stage.publish(manifest)
        assert hashed == ["graph", "report"]
        assert list(check_whole(tmp_path / "new").files) == ["graph", "report"]

    @pytest.mark.parametrize("change", ["write", "replace", "remove"])
    def test_what_is_published_is_what_was_proven(
        self, small: Path, tmp_path: Path, change: str
    ) -> None:
        """The same number of bytes, at once after the files were listed."""
        manifest = replace(Manifest.read(small), layers=(), adapters=())
        with staging(tmp_path, "new") as stage:
            graph = stage.folder / "graph"
            graph.write_text("1")
            stage.list_files(manifest)
            match change:
                case "write":
                    with graph.open("r+") as file:
                        file.write("2")
                case "replace":
                    (stage.folder / "other").write_text("2")
                    (stage.folder / "other").rename(graph)
                case "remove":
                    graph.unlink()
            with pytest.raises(UsageError, match=r"/graph: something changed it while it was pro"):
                stage.publish(manifest)
        assert left_over(tmp_path) == []
        assert not (tmp_path / "new").exists()

    def test_a_reader_never_finds_a_gap(self, small: Path, tmp_path: Path) -> None:
        manifest = Manifest.read(small)
        shutil.copytree(small, tmp_path / "tiny")
        finished = threading.Event()
        seen: list[str] = []

        def read() -> None:
            while not finished.is_set() and len(seen) < 100_000:
                try:
                    text = (tmp_path / "tiny" / MANIFEST_FILE).read_text(encoding="utf-8")
                    seen.append(json.loads(text)["name"])
                except Exception as error:
                    seen.append(repr(error))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for index in range(60):
                with staging(tmp_path, "tiny") as stage:
                    stage.publish(replace(manifest, name=f"build-{index}"))
        finally:
            finished.set()
            reader.join()
        assert set(seen) <= {"tiny", *(f"build-{index}" for index in range(60))}
        assert seen

    def test_a_failed_one_replaces_an_older_failed_one(self, small: Path, tmp_path: Path) -> None:
        shutil.copytree(small, tmp_path / "tiny.failed")
        with staging(tmp_path, "tiny") as stage:
            kept = stage.keep_failed(
                replace(Manifest.read(small), name="other", layers=(), adapters=())
            )
        assert kept == tmp_path / "tiny.failed"
        assert check_whole(kept).name == "other"
        assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny.failed"]

    def test_left_over_folders_go_and_those_of_other_names_stay(self, tmp_path: Path) -> None:
        for name in (".tiny.staging-1", ".tiny.staging-22", ".tiny.staging-x.staging-1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("1")
        with staging(tmp_path, "tiny") as stage:
            assert left_over(tmp_path) == [stage.folder.name, ".tiny.staging-x.staging-1"]
        assert left_over(tmp_path) == [".tiny.staging-x.staging-1"]

    def test_left_over_files_and_links_go_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/file").touch()
        (tmp_path / ".tiny.staging-1").touch()
        (tmp_path / ".tiny.staging-2").symlink_to(tmp_path / "mine")
        (tmp_path / ".tiny.staging-3").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / ".tiny.staging-4")
        with staging(tmp_path, "tiny"):
            pass
        assert left_over(tmp_path) == []
        assert (tmp_path / "mine/file").is_file()

    def test_a_left_over_that_stays_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / ".tiny.staging-1").mkdir()

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(shutil, "rmtree", refuse)
        with (
            pytest.raises(UsageError, match=r"staging-1: what an earlier build left .* remove it"),
            staging(tmp_path, "tiny"),
        ):
            pass

    @pytest.mark.parametrize("reads", [False, True], ids=["alone", "with-a-reader"])
    def test_a_lock_that_is_no_file(self, tmp_path: Path, reads: bool) -> None:
        lock = tmp_path / ".tiny.lock"
        os.mkfifo(lock)
        reader = os.open(lock, os.O_RDONLY | os.O_NONBLOCK) if reads else None
        with pytest.raises(UsageError, match="cannot be written"), staging(tmp_path, "tiny"):
            pass
        if reader is not None:
            os.close(reader)
        lock.unlink()
        lock.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match="cannot be written"), staging(tmp_path, "tiny"):
            pass
        assert not (tmp_path / "elsewhere").exists()

    @pytest.mark.parametrize("out", ["x" * 5000, "a\0b"], ids=["long", "nul"])
    def test_a_path_that_no_file_system_takes(self, tmp_path: Path, out: str) -> None:
        with (
            pytest.raises(UsageError, match=r"no path to write to|cannot be written"),
            staging(tmp_path / out, "tiny"),
        ):
            pass

    def test_mark_verified(self, small: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(small, tmp_path / "tiny"))
        manifest = Manifest.read(folder)
        mark_verified(folder, manifest, ParitySummary("passed", ("onnx-cuda",), 0.25, 1.0))
        again = check_whole(folder)
        assert again.parity.checked == ("onnx-cuda",)
        assert replace(again, parity=manifest.parity) == manifest
        with pytest.raises(UsageError, match="tiny: a build replaced it while it was verified; ve"):
            mark_verified(folder, manifest, manifest.parity)
        assert check_whole(folder) == again
        assert {path.name for path in folder.iterdir()} == {path.name for path in small.iterdir()}

    def test_a_reader_never_finds_a_manifest_without_its_digest(
        self, small: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(small, tmp_path / "tiny"))
        finished = threading.Event()
        seen: list[str] = []

        def read() -> None:
            while not finished.is_set():
                try:
                    seen.append(Manifest.read(folder).parity.status)
                except Exception as error:
                    seen.append(repr(error))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for error in range(100):
                parity = ParitySummary("passed", ("onnx-cuda",), float(error), 1.0)
                mark_verified(folder, Manifest.read(folder), parity)
        finally:
            finished.set()
            reader.join()
        assert set(seen) == {"passed"}

    def test_mark_verified_that_was_cut_short(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed between any two of its steps, it leaves an artifact that opens."""
        parity = ParitySummary("passed", ("onnx-cuda",), 0.25, 1.0)
        for steps in range(3):
            folder = Path(shutil.copytree(small, tmp_path / str(steps)))
            left, put = [steps], artifact_module.write_whole

            def put_some(
                file: Path, content: bytes, left: list[int] = left, put: Any = put
            ) -> None:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                put(file, content)

            manifest = Manifest.read(folder)
            with monkeypatch.context() as patch:
                patch.setattr(artifact_module, "write_whole", put_some)
                with pytest.raises(KeyboardInterrupt):
                    mark_verified(folder, manifest, parity)
            checked = check_whole(folder).parity.checked
            assert (checked == ("onnx-cuda",)) == (steps == 2), steps
            mark_verified(folder, Manifest.read(folder), parity)
            assert len((folder / DIGEST_FILE).read_text().splitlines()) == 1


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def make_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / MANIFEST_FILE).write_text("{}")
    path.symlink_to(elsewhere)


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


class TestTargetsThatAreNotOurs:
    """A build touches nothing but artifacts, and says so before it has worked for long."""

    NO_ARTIFACT = r"{} exists and is no artifact \(it has no manifest.json\); it is not overwritten"
    LINK = r"{} is a symbolic link; a build would replace the link and not what it leads to"

    @pytest.mark.parametrize("name", ["tiny", r"tiny.failed"])
    @pytest.mark.parametrize(
        ("make", "text"),
        [
            (make_file, NO_ARTIFACT),
            (make_folder, NO_ARTIFACT),
            (make_link, LINK),
            (make_dangling_link, LINK),
        ],
    )
    def test_is_left_alone(
        self, tmp_path: Path, make: Callable[[Path], None], text: str, name: str
    ) -> None:
        make(tmp_path / name)
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        pattern = text.format(re.escape(str(tmp_path / name)))
        with pytest.raises(UsageError, match=pattern), staging(tmp_path, "tiny"):
            pass
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before

    def test_out_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        text = r"--out .*out: cannot be written \(.*File exists.*\); choose another"
        with pytest.raises(UsageError, match=text), staging(tmp_path / "out", "tiny"):
            pass

    def test_a_name_that_a_failed_build_would_take(self, tmp_path: Path) -> None:
        text = r"tiny\.failed: a folder of this name is kept for the report of a build that fails;"
        with pytest.raises(UsageError, match=text), staging(tmp_path, "tiny.failed"):
            pass

    def test_through_a_build(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        spec = write_small(tmp_path)
        (tmp_path / "out").mkdir()
        make_folder(tmp_path / "out/tiny")
        assert run_cli(monkeypatch, "build", spec, "--out", tmp_path / "out") == 2
        assert "exists and is no artifact" in capsys.readouterr().err
        assert (tmp_path / "out/tiny/thesis.tex").read_text() == "mine"


class TestTwoBuildsAtOnce:
    TEXT = "another build of .*tiny is running; wait for it, or build with another --out"

    def test_the_lock_is_held(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        spec, out = write_small(tmp_path), tmp_path / "out"
        out.mkdir()
        with (out / ".tiny.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(BuildBusyError, match=self.TEXT):
                build(spec, out)
            assert run_cli(monkeypatch, "build", spec, "--out", out) == 2
        assert re.search(f"BuildBusyError: {self.TEXT}", capsys.readouterr().err)
        assert sorted(path.name for path in out.iterdir()) == [".tiny.lock"]

    def test_another_name_is_free(self, tmp_path: Path) -> None:
        with staging(tmp_path, "a"), staging(tmp_path, "b") as stage:
            assert stage.folder.is_dir()
            with pytest.raises(BuildBusyError), staging(tmp_path, "a"):
                pass

    @pytest.mark.slow
    def test_two_real_builds(self, tmp_path: Path) -> None:
        spec, out = write_small(tmp_path), tmp_path / "out"
        first = start_build(spec, out)
        read_until(first, "read weights")  # it holds the lock now
        first.send_signal(signal.SIGSTOP)
        second = start_build(spec, out)
        _, error = second.communicate(timeout=120)
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=120)
        assert (first.returncode, second.returncode) == (0, 2)
        assert re.search(f"BuildBusyError: {self.TEXT}", error)
        check_whole(out / "tiny")
        assert left_over(out) == []


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One project, copied to two folders and built there, each by a checkout of its own."""
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second-and-longer")]
    export = {"formats": ["torchscript", "onnx"], "strategy": "augmented"}
    specs = [write_tenants(folder, export=export) for folder in folders]
    processes = []
    for seed, (folder, spec) in enumerate(zip(folders, specs, strict=True)):
        shutil.copytree(ROOT / "loraexport", folder / "code/loraexport")
        shutil.copytree(ROOT / "runtime", folder / "code/runtime")
        path = os.pathsep.join((str(folder / "code"), str(folder / "code/runtime")))
        out = folder / "artifacts"
        processes.append(start_build(spec, out, PYTHONHASHSEED=str(seed), PYTHONPATH=path))
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    first, second = (folder / "artifacts/tiny" for folder in folders)
    return first, second


class TestDeterminism:
    def test_files(self, twins: tuple[Path, Path]) -> None:
        first, second = (
            {path.relative_to(one): path for path in one.rglob("*") if path.is_file()}
            for one in twins
        )
        assert set(first) == set(second)
        differing = {
            str(name) for name in first if first[name].read_bytes() != second[name].read_bytes()
        }
        may_differ = {str(name) for name in first if name.suffix == ".ts"}
        reports = {"parity/parity.json", "parity/parity.md"}
        assert differing <= may_differ | reports | {MANIFEST_FILE, DIGEST_FILE}
        same = {"graphs/qkv.onnx", "spec.yaml", "parity/cases.safetensors"}
        assert same <= {str(name) for name in first} - differing
        assert {path.suffix for path in first} >= {".onnx", ".safetensors", ".ts"}

    def test_manifest(self, twins: tuple[Path, Path]) -> None:
        data = [json.loads((one / MANIFEST_FILE).read_text(encoding="utf-8")) for one in twins]
        for one in data:
            assert one.pop("created")
            assert one.pop("parity")["status"] == "passed"
            for name, entry in one["files"].items():
                if name.endswith((".ts", "parity.json", "parity.md")):
                    entry.clear()
        assert data[0] == data[1]
        assert list(data[0]["files"]) == list(data[1]["files"])

    def test_graphs_name_no_place_on_this_machine(self, twins: tuple[Path, Path]) -> None:
        marks = ["site-packages", ".py", "/root", "/home", "/tmp", "/usr", os.getcwd()]
        marks += [str(folder.parent.parent) for folder in twins] + [sys.prefix]
        graphs = [path for path in twins[0].rglob("*") if path.suffix in (".onnx", ".ts")]
        assert len(graphs) == 6
        for graph in graphs:
            records = {graph.name: graph.read_bytes()}
            if graph.suffix == ".ts":  # an archive: its code has .py in names, not in texts
                with zipfile.ZipFile(graph) as archive:
                    records = {name: archive.read(name) for name in archive.namelist()}
                assert not any("debug_pkl" in name for name in records)
            for name, data in records.items():
                found = [mark for mark in marks if mark.encode() in data]
                assert not found, f"{graph.name}, {name}: {found}"


class TestFailedParity:
    """No graph is within 1e-30 of float64."""

    IMPOSSIBLE = {"tolerance": 1e-30}  # noqa: RUF012  read only

    def test_the_report_is_kept_and_nothing_is_published(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out, failed = tmp_path / "out", tmp_path / "out/tiny.failed"
        spec = write_small(tmp_path, parity=self.IMPOSSIBLE)
        text = (
            r"\d+ of \d+ comparisons failed; nothing was published\. Worst: [\w-]+, layer 'up',"
            r" site 'blocks\.0\.up', adapter '\w+', case '[\w-]+': its error of .* is above 1e-30"
            r" \(parity\.tolerance\)\. The base fails by itself: its graph differs, not an adapter"
            r"\. "
            r"Report and inputs: .*tiny\.failed/parity\. Repeat: loraexport verify .*tiny\.failed"
        )
        with pytest.raises(ParityError, match=text):
            build(spec, out)
        assert sorted(path.name for path in out.iterdir()) == [".tiny.lock", "tiny.failed"]
        assert check_whole(failed).parity.status == "failed"
        assert "FAILED" in (failed / "parity/parity.md").read_text(encoding="utf-8")
        assert json.loads((failed / "parity/parity.json").read_text())["status"] == "failed"

        assert run_cli(monkeypatch, "verify", failed) == 3
        assert re.search(r"ParityError: \d+ of \d+ comparisons failed", capsys.readouterr().err)
        assert Manifest.read(failed).parity.status == "failed"

    def test_an_older_artifact_and_an_older_report(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        shutil.copytree(small, out / "tiny")
        shutil.copytree(small, out / "tiny.failed")
        spec = write_small(tmp_path, parity=self.IMPOSSIBLE)
        assert run_cli(monkeypatch, "build", spec, "--out", out) == 3
        assert check_whole(out / "tiny") == Manifest.read(small)
        assert check_whole(out / "tiny.failed").parity.tolerance == 1e-30
        assert left_over(out) == []


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder, _ = build(write_small(tmp_path), tmp_path / "out")
    finally:
        os.umask(old)
    modes = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
