"""Pages and examples, done as they say: their commands, their Python blocks, their programs."""

import hashlib
import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.adapters import write_adapter
from support.builds import write_model_project
from support.decoders import ADAPTERS, FAMILIES, write_decoder
from support.documents import ROOT, read_blocks, read_commands
from support.home import Home
from support.models import write_bert

from loraexport.cli import app as cli
from loraexport.pipeline.build import build

README = ROOT / "README.md"
GUIDES = ROOT / "docs/guides"


@pytest.fixture(scope="module")
def workplace(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone's, with the artifacts of the quickstart and of MiniLM."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("specs", "examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "artifacts").mkdir()
    for spec in ("quickstart", "minilm"):
        artifact = home.build(ROOT / f"specs/{spec}.yaml")
        (folder / "artifacts" / spec).symlink_to(artifact)
    return folder


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two adapters of a user's own."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("own")
    write_bert(folder / "my-model")
    for seed, name in enumerate(("sql", "chat")):
        site = f"encoder.layer.{seed}.attention.self.value"
        config = {"target_modules": [site]}
        write_adapter(folder / "adapters" / name, {site: (32, 32)}, seed=seed, config=config)
    return folder


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command of a page in this process, in the current folder; its exit code."""
    program, *arguments = shlex.split(command)
    assert program == "loraexport"
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def run_blocks(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks in their order, in one namespace."""
    for block in read_blocks(page, "python"):
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names)
    return names


def run_program(*arguments: str | Path, at: Path) -> str:
    """What an example prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_module(*arguments: str | Path, at: Path) -> tuple[int, str]:
    """The exit code of `python -m loraexport_runtime …`, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "loraexport_runtime", *map(str, arguments)]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


def load_program(path: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_your_own_model_in_four_steps(own_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_model)
    commands = [line for line in read_commands(README) if line.startswith("loraexport ")]
    assert [line.split()[1] for line in commands] == ["init", "build", "verify"]
    for command in commands:
        assert run_command(command, monkeypatch) == 0, command
    assert read_commands(GUIDES / "own-model.md") == commands
    for page in (README, GUIDES / "own-model.md"):
        out = run_blocks(page, {})["out"]
        rows = next(iter(out.values()))
        assert len(rows) == 3
        assert np.abs(rows[0] - rows[1]).max() > 1e-3, "two tenants' rows of one text differ"


def test_quickstart(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    vectors = run_blocks(ROOT / "docs/quickstart.md", {})["out"]["sentence_embedding"]
    assert vectors.shape == (3, 384)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_mixed_batch(workplace: Path) -> None:
    printed = run_program("examples/mixed_batch.py", "artifacts/quickstart", at=workplace)
    shown = next(line for line in README.read_text().splitlines() if "moved:" in line)
    assert shown in printed.splitlines()


@pytest.mark.slow
def test_three_tenants(workplace: Path) -> None:
    printed = run_program(
        "examples/tenants.py", "artifacts/minilm", "--limit", "5", "--shuffle", at=workplace
    )
    for name in ("pydoc", "topics", "entity"):
        line = next(line for line in printed.splitlines() if line.startswith(name))
        mixed, alone = line.removeprefix(name).strip().split("  ", 1)
        assert mixed.strip() == alone.strip()


def test_embeddings_py(workplace: Path) -> None:
    """Of four who ask at once, the one whose adapter was trained for it finds the name."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program = ("examples/serve/embeddings.py", "artifacts/minilm", "--port", port)
    lines = run_program(*program, at=workplace).splitlines()
    found = {line.split()[0]: "PRECEDED BY APOSTROPHE" in line for line in lines[1:]}
    assert found == {"minilm": False, "entity": True, "pydoc": False, "topics": False}


def test_plain_onnxruntime(workplace: Path) -> None:
    printed = run_program("examples/plain_onnxruntime.py", "artifacts/minilm", at=workplace)
    moved = [float(line.split()[-2]) for line in printed.splitlines() if "moved:" in line]
    assert len(moved) == 4
    assert min(moved[:3]) > 1
    assert moved[3] == 0
    assert printed.rstrip().endswith("every row is the base: True")
    assert "loraexport" not in (ROOT / "examples/plain_onnxruntime.py").read_text().split('"""')[2]


def test_a_plain_caller_checks_slots(workplace: Path) -> None:
    program = load_program("examples/plain_onnxruntime.py")
    manifest = json.loads((workplace / "artifacts/minilm/manifest.json").read_text())
    assert program.slot_numbers(["topics", None], manifest).tolist() == [2, 0]
    for number in (-1, 4):
        with pytest.raises(ValueError, match="expected 0 to 3"):
            program.check_slots(np.array([0, number]), 3)
    with pytest.raises(KeyError, match="nobody"):
        program.slot_numbers(["nobody"], manifest)


def test_a_negative_slot_number_gathers_the_last_slots_rows(tmp_path: Path) -> None:
    """Why callers check: what docs/reference/artifact.md says of numbers that nobody checks."""
    spec = write_model_project(tmp_path, features=["bias"], export={"formats": ["onnx"]})
    folder, _ = build(spec, tmp_path / "artifacts")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "graphs/model.onnx", options)
    ids = np.array([[5, 6, 7]])
    feeds = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    stacks = session.get_overridable_initializers()
    stack = next(value for value in stacks if value.name.endswith(".bias"))
    biases = np.zeros(stack.shape, np.float32)
    biases[-1] = np.arange(stack.shape[1])  # the last slot's own row

    def run(number: int) -> np.ndarray:
        out: Any = session.run(
            None, {**feeds, stack.name: biases, "adapter_ids": np.array([number])}
        )
        return np.asarray(out[0])

    assert np.abs(run(-1) - run(0)).max() > 1e-3, "another tenant's bias, and no error"


def test_generation(tmp_path: Path) -> None:
    """On a tiny decoder: what it says is nonsense, but each adapter has its own."""
    folder, _ = build(write_decoder(tmp_path, FAMILIES["Llama"]), tmp_path / "artifacts")
    printed = run_program(ROOT / "examples/generation.py", folder, at=tmp_path)
    question = "What is the capital of France?"
    answers = {
        name: printed.split(f"[{name}] {question}\n", 1)[1].split("\n\n[", 1)[0]
        for name in ("base", *ADAPTERS)
    }
    assert len(set(answers.values())) == 3


def test_tables_from_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    commands = [line for line in read_commands(GUIDES / "benchmarks.md") if "--from" in line]
    plain, calibrate = commands
    assert calibrate.replace(" --calibrate", "") == plain
    assert run_command(calibrate, monkeypatch) == 0
    assert "launch" in capsys.readouterr().err
    assert (tmp_path / "bench/bench.md").is_file()


@pytest.mark.slow
def test_the_script_counts_cycles() -> None:
    command = [sys.executable, ROOT / "scripts/fuzz", "--loads", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("loads: 20 cycles, ")
    assert " 0 wrong in " in done.stdout


HAS_NODE = (ROOT / "examples/node/node_modules/onnxruntime-node").is_dir()


@pytest.mark.skipif(not HAS_NODE, reason="npm install --prefix examples/node --ignore-scripts")
def test_node(workplace: Path) -> None:
    """The same shares as in Python, of the same batch."""
    command = ["node", "examples/node/run.mjs", "artifacts/minilm"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=True)
    printed = run_program("examples/plain_onnxruntime.py", "artifacts/minilm", at=workplace)
    shares = [line for line in printed.splitlines() if "moved:" in line]
    assert [line for line in done.stdout.splitlines() if "moved:" in line] == shares


@pytest.fixture(scope="module")
def tenants_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifact and the adapter that the page on operations speaks of."""
    folder = tmp_path_factory.mktemp("tenants")
    spec = write_model_project(folder, export={"formats": ["onnx"]})
    artifact, _ = build(spec, folder / "artifacts")
    artifact.rename(folder / "artifacts/tenants")
    (folder / "adapters").mkdir()
    (folder / "adapters/legal").symlink_to(folder / "legal")
    return folder


def test_check_before_traffic(tenants_folder: Path) -> None:
    commands = [line for line in read_commands(GUIDES / "operations.md") if "--prov" not in line]
    code, printed = run_module(*shlex.split(commands[0])[3:], at=tenants_folder)
    assert code == 0, printed
    digest = next(line for line in printed.splitlines() if line.startswith("digest: "))[8:]
    pinned = commands[1].replace("$DIGEST", digest)
    assert run_module(*shlex.split(pinned)[3:], at=tenants_folder)[0] == 0
    other = commands[1].replace("$DIGEST", "0" * 64)
    assert run_module(*shlex.split(other)[3:], at=tenants_folder)[0] == 5


def test_operations(tenants_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tenants_folder)
    ids = np.array([[5, 6, 7], [5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    content = Path("artifacts/tenants/manifest.json").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    row = dict(zip(("ids", "mask", "types"), (value[0] for value in inputs.values()), strict=True))
    names = run_blocks(GUIDES / "operations.md", {"inputs": inputs, "digest": digest, **row})
    assert len(names["out"]["last_hidden_state"]) == 2
