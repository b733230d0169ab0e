"""The command line: one readable block and an exit code for every error, JSON for programs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.adapters import write_adapter
from support.builds import write_one_layer
from support.manifests import write_manifest
from support.models import write_base

import loraexport
from loraexport.cli import app as cli
from loraexport.cli import console
from loraexport.errors import ExportError, exit_code
from loraexport.pipeline.build import build
from loraexport.spec.reader import json_schema
from loraexport_runtime.contract.files import digest_file

torch.set_num_threads(1)


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the entry point in this process, where no stream is a terminal."""

    def run_command(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["loraexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return run_command


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published artifact. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("published")
    artifact, _ = build(write_one_layer(folder), folder / "out")
    return artifact


def assert_readable(done: Done, code: int, title: str) -> None:
    assert (done.code, done.out) == (code, ""), done
    assert done.err.startswith(f"{title}: ") or f"\n{title}: " in done.err, done.err
    assert "Traceback" not in done.err
    assert done.err.count(f"{title}: ") == 1


# ---------------------------------------------------------------- exit codes


def spoil_spec(folder: Path) -> Path:
    return write_one_layer(folder, nmae="x")


def spoil_base(folder: Path) -> Path:
    spec = write_one_layer(folder)
    write_base(folder / "base", {"other.weight": np.zeros((6, 8), np.float32)})
    return spec


def spoil_base_file(folder: Path) -> Path:
    spec = write_one_layer(folder)
    (folder / "base/model.safetensors").write_bytes(b"short")
    return spec


def spoil_adapter(folder: Path) -> Path:
    spec = write_one_layer(folder)
    write_adapter(folder / "sql", {"q": (8, 6)}, rank=2, config={"alora_invocation_tokens": [5]})
    return spec


def spoil_adapter_tensors(folder: Path) -> Path:
    spec = write_one_layer(folder)
    write_adapter(folder / "sql", {"q": (8, 7)}, rank=2)
    return spec


SPOILED = [
    (spoil_spec, 2, "SpecError", "nmae: unknown key (did you mean 'name'?)"),
    (spoil_base, 4, "BaseModelError", "the base has no tensor 'q.weight'"),
    (spoil_base_file, 4, "WeightsError", "not a whole safetensors file"),
    (spoil_adapter, 4, "AdapterConfigError", "alora_invocation_tokens = [5] is not supported"),
    (spoil_adapter_tensors, 4, "AdapterWeightsError", "the adapter belongs to another base"),
]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize(("spoil", "code", "title", "message"), SPOILED)
def test_input_that_cannot_be_used(
    run: Run,
    tmp_path: Path,
    spoil: Callable[[Path], Path],
    code: int,
    title: str,
    message: str,
    command: str,
    as_json: bool,
) -> None:
    options = ["--out", tmp_path / "out"] if command == "build" else []
    done = run(command, spoil(tmp_path), *options, *(["--json"] if as_json else []))
    assert_readable(done, code, title)
    assert message in done.err
    assert not (tmp_path / "out").exists(), "nothing was begun"


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_nan_is_found_before_anything_is_published(run: Run, tmp_path: Path, where: str) -> None:
    spec = write_one_layer(tmp_path)
    if where == "base":
        write_base(tmp_path / "base", {"q.weight": np.full((6, 8), np.nan, np.float32)})
    else:
        nan = {"base_model.model.q.lora_B.weight": np.full((6, 2), np.nan, np.float32)}
        write_adapter(tmp_path / "sql", {"q": (8, 6)}, rank=2, tensors=nan)
    done = run("build", spec, "--out", tmp_path / "out")
    assert_readable(done, 4, "WeightsError")
    assert "values are NaN or Inf" in done.err
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "missing.yaml"),
        ("build", "missing.yaml"),
        ("plan", "missing.yaml", "--json"),
    ],
)
def test_missing_spec(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert_readable(done, 2, "SpecError")
    assert done.err.strip().endswith(
        "missing.yaml:1: no such file (give the path of a spec, as specs/quickstart.yaml)"
    ), done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("plan",), ("nothing",), ("plan", "x", "--jsno"), ("build", "a", "b")]
)
def test_usage(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage: " in done.err
    assert "Traceback" not in done.err


def test_build_over_a_folder_that_is_no_artifact(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out/tiny").mkdir(parents=True)
    (tmp_path / "out/tiny/notes.txt").write_text("mine")
    done = run("build", write_one_layer(tmp_path), "--out", tmp_path / "out")
    assert_readable(done, 2, "UsageError")
    assert "is no artifact" in done.err
    assert (tmp_path / "out/tiny/notes.txt").read_text() == "mine"


def test_parity_that_cannot_be_proven(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 ONNX graphs where there is no CUDA device."""
    monkeypatch.setattr("loraexport.parity.implementations.has_cuda", lambda: False)
    spec = write_one_layer(tmp_path, export={"formats": ["onnx"], "dtype": "bfloat16"})
    done = run("build", spec, "--out", tmp_path / "out")
    assert_readable(done, 3, "ParityError")
    assert "parity: {onnx: deferred}" in done.err
    assert not (tmp_path / "out").exists()


def test_fault_of_our_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("loraexport.plan.plan.make_plan", fail)
    done = run("plan", write_one_layer(tmp_path))
    assert_readable(done, 1, "ZeroDivisionError")
    assert "a bug ('loraexport --debug …' shows where)" in done.err
    assert exit_code(ExportError("x")) == 1


def test_output_folder_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("build", write_one_layer(tmp_path), "--out", tmp_path / "file/out")
    assert_readable(done, 2, "UsageError")
    assert str(tmp_path / "file") in done.err


@pytest.mark.parametrize(("fail", "code"), [(False, 2), (True, 1)])
def test_debug_shows_the_traceback_and_keeps_the_code(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: bool, code: int
) -> None:
    if fail:
        monkeypatch.setattr("loraexport.spec.reader.read_spec", lambda path: 1 // 0)
    done = run("--debug", "plan", tmp_path / "missing.yaml")
    assert (done.code, done.out) == (code, "")
    assert "Traceback (most recent call last)" in done.err
    assert ("ZeroDivisionError" if fail else "SpecError: ") in done.err


# ---------------------------------------------------------------- commands


def test_version(run: Run) -> None:
    assert run("--version") == Done(0, f"{loraexport.__version__}\n", "")


def test_no_command_shows_the_help(run: Run) -> None:
    done = run()
    for command in ("build", "plan", "verify", "inspect", "schema"):
        assert command in done.out + done.err


def test_schema(run: Run) -> None:
    done = run("schema")
    assert (done.code, done.err, done.data) == (0, "", json_schema())


def test_plan(run: Run, tmp_path: Path) -> None:
    spec = write_one_layer(tmp_path)
    text = run("plan", spec)
    assert (text.code, text.err) == (0, "")
    for word in ("tiny: float32, 1 slots of rank 2, base base", "sql", "Sites:\n  q: q\n"):
        assert word in text.out
    done = run("plan", spec, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.data["layers"][0]["sites"] == ["q"]


def test_build_in_plain_lines(run: Run, tmp_path: Path) -> None:
    """Where there is no terminal: a line per stage on stderr, the result on stdout."""
    spec = write_one_layer(tmp_path)
    done = run("build", spec, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out.startswith(f"published {tmp_path / 'out/tiny'}: parity passed, largest error ")
    digest = digest_file(tmp_path / "out/tiny/manifest.json")
    assert done.out.splitlines()[-1] == f"digest, to pin it: {digest}"
    stages = [line.removeprefix(f"building {spec}: ") for line in done.err.splitlines()]
    assert stages == ["plan", "read weights", "export q to TorchScript", "verify", "publish"]


def test_build_as_json(run: Run, tmp_path: Path) -> None:
    done = run("build", write_one_layer(tmp_path), "--out", tmp_path / "out", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.data["artifact"] == str(tmp_path / "out/tiny")
    assert done.data["digest"] == digest_file(tmp_path / "out/tiny/manifest.json")
    assert done.data["parity"]["status"] == "passed"


def test_adapter_that_changes_nothing_is_named(run: Run, tmp_path: Path) -> None:
    spec = write_one_layer(tmp_path)
    zero = {"base_model.model.q.lora_B.weight": np.zeros((6, 2), np.float32)}
    write_adapter(tmp_path / "sql", {"q": (8, 6)}, rank=2, tensors=zero)
    done = run("build", spec, "--out", tmp_path / "out")
    assert done.code == 0
    assert "warning: adapter 'sql' changes nothing: all its B are zero" in done.err


# ---------------------------------------------------------------- inspect


def test_inspect_artifact(run: Run, published: Path) -> None:
    done = run("inspect", published, "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.data["name"], done.data["num_slots"]) == ("tiny", 1)
    text = run("inspect", published)
    assert (text.code, yaml.safe_load(text.out)["name"]) == (0, "tiny")
    assert done.data["digest"] == digest_file(published / "manifest.json")
    assert yaml.safe_load(text.out) == done.data


def test_inspect_adapter(run: Run, tmp_path: Path) -> None:
    write_one_layer(tmp_path)
    done = run("inspect", tmp_path / "sql", "--json")
    assert (done.code, done.err) == (0, "")
    (module,) = done.data["modules"].values()
    assert module.pop("delta_norm") > 0
    sizes = {"rank": 2, "in": 8, "out": 6, "scaling": 4.0}
    assert module == {**sizes, "embedding": False, "dora": False}
    assert (done.data["max_rank"], done.data["rslora"]) == (2, False)
    assert yaml.safe_load(run("inspect", tmp_path / "sql").out) == done.data


def test_inspect_spec(run: Run, tmp_path: Path) -> None:
    done = run("inspect", write_one_layer(tmp_path), "--json")
    assert (done.code, done.err) == (0, "")
    assert done.data["adapters"] == [{"name": "sql", "path": "sql", "scale": 1.0}]


def test_inspect_bad_spec(run: Run, tmp_path: Path) -> None:
    assert_readable(run("inspect", spoil_spec(tmp_path)), 2, "SpecError")


def test_inspect_bad_adapter(run: Run, tmp_path: Path) -> None:
    spoil_adapter(tmp_path)
    assert_readable(run("inspect", tmp_path / "sql", "--json"), 4, "AdapterConfigError")


@pytest.mark.parametrize("command", ["inspect", "build", "plan", "init"])
def test_a_path_that_no_file_system_takes(run: Run, tmp_path: Path, command: str) -> None:
    path = "x" * 5000
    if command == "init":
        write_base(tmp_path / "base")
        arguments = ("init", "--base", tmp_path / "base", "--adapter", f"a={path}")
        assert_readable(run(*arguments, "--out", tmp_path / "spec.yaml"), 4, "BaseModelError")
        done = run("init", "--base", tmp_path / "base", "--adapter", path, "--out", tmp_path / "s")
        assert_readable(done, 2, "UsageError")
        return
    done = run(command, path)
    assert_readable(done, 2, "UsageError" if command == "inspect" else "SpecError")
    assert len(done.err) < 8000  # with the path in what build says of its progress


def test_inspect_nothing(run: Run, tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert_readable(done, 2, "UsageError")
    assert "neither an artifact (it has no manifest.json) nor an adapter (it has no" in done.err
    write_adapter(tmp_path / "sql", {"q": (8, 8)})
    done = run("inspect", tmp_path)
    assert_readable(done, 2, "UsageError")
    assert "no adapter, but a folder of 1: sql; give one of them" in done.err
    done = run("inspect", tmp_path / "missing")
    assert_readable(done, 2, "UsageError")
    assert "missing: no such file or folder; give an artifact, an adapter or a spec" in done.err


def test_inspect_damaged_artifact(run: Run, published: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    with (copy / "graphs/q.ts").open("ab") as file:
        file.write(b"x")
    done = run("inspect", copy)
    assert_readable(done, 5, "ArtifactError")
    assert "graphs/q.ts" in done.err


# ---------------------------------------------------------------- verify


def test_verify(run: Run, published: Path) -> None:
    done = run("verify", published, "--torchscript", "--base", published.parents[1] / "base")
    assert done.code == 0, done.err
    assert "parity passed" in done.out


def test_verify_of_torchscript_alone_needs_consent(run: Run, published: Path) -> None:
    done = run("verify", published, "--base", published.parents[1] / "base")
    assert_readable(done, 2, "UsageError")
    assert "it has TorchScript alone, which is code that the artifact brings" in done.err
    assert "verify it with --torchscript" in done.err


def test_verify_as_json(run: Run, published: Path) -> None:
    done = run("verify", published, "--providers", "cpu", "--torchscript", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.data["status"] == "passed"


def test_verify_of_what_was_deferred(run: Run, published: Path, tmp_path: Path) -> None:
    """The manifest says so from then on, so that its digest is another."""
    copy = shutil.copytree(published, tmp_path / "copy")
    text = (copy / "manifest.json").read_text(encoding="utf-8")
    deferred = text.replace('"status": "passed"', '"status": "deferred"')
    write_manifest(copy, deferred)
    done = run("verify", copy, "--providers", "cpu", "--torchscript")
    assert done.code == 0, done.err
    digest = digest_file(copy / "manifest.json")
    assert done.err.splitlines()[-1] == f"verified; digest, to pin it: {digest}"


def test_verify_damaged_artifact(run: Run, published: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    (copy / "manifest.json").write_text("{")
    assert_readable(run("verify", copy), 5, "ArtifactError")
    assert_readable(run("verify", tmp_path / "missing", "--json"), 5, "ArtifactError")


def test_verify_against_another_base(run: Run, published: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "other", {"q.weight": np.ones((6, 8), np.float32)})
    done = run("verify", published, "--torchscript", "--base", tmp_path / "other", "--json")
    assert_readable(done, 4, "BaseModelError")
    assert "its weights differ from those that the artifact was built from" in done.err


def test_verify_on_a_provider_that_is_not_one(run: Run, published: Path) -> None:
    done = run("verify", published, "--torchscript", "--providers", "tpu", "--json")
    assert_readable(done, 2, "ProviderError")


# ---------------------------------------------------------------- a terminal


def test_error_on_a_terminal_is_a_panel(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = console.Console(
        stderr=True, force_terminal=True, width=200, markup=False, emoji=False, color_system=None
    )
    monkeypatch.setattr(console, "err_console", panel)
    done = run("plan", tmp_path / "[bold] :x:.yaml")
    assert (done.code, done.out) == (2, "")
    assert "╭─ SpecError ─" in done.err
    assert "[bold] :x:.yaml:1: no such file" in done.err


def test_markup_in_a_path_is_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "[bold] :smile:"
    folder.mkdir()
    spec = write_one_layer(folder)
    done = run("build", spec, "--out", folder / "out")
    assert done.code == 0, done.err
    assert f"published {folder / 'out/tiny'}: parity" in done.out
    assert f"building {spec}: plan" in done.err
