"""`loraexport generate`, in this process."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from support.decoders import (
    EOS,
    write_family,
)
from support.home import Home
from typer.testing import CliRunner

from loraexport.cli import app as cli
from loraexport_runtime.generation.generator import TextGenerator
from loraexport_runtime.generation.load import load_generator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    """Llama's, with a tokenizer. Copy it before you change a file of it."""
    return home.artifact(write_family, "Llama")


@pytest.fixture(scope="module")
def generator(artifact: Path) -> TextGenerator:
    return load_generator(artifact)


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`loraexport generate` in this process."""

    def run_command(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["loraexport", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return run_command


def test_generate_on_the_command_line(run: Run, artifact: Path, generator: TextGenerator) -> None:
    arguments = ["--prompt", "hello", "--prompt", "[a] :b:", "--max-new-tokens", 5]
    arguments += ["--adapter", "first", "--adapter", "base"]
    expected = generator.generate(["hello", "[a] :b:"], adapters=["first", None], max_new_tokens=5)
    done = run(artifact, *arguments)
    assert (done.code, done.err) == (0, "")
    lines = ["[first] hello", expected[0].text, "[base] [a] :b:", expected[1].text]
    assert done.out.split() == "\n".join(lines).split()
    done = run(artifact, *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == [
        {
            "prompt": prompt,
            "adapter": name,
            "text": one.text,
            "tokens": list(one.tokens),
            "finish_reason": one.finish_reason,
        }
        for prompt, name, one in zip(["hello", "[a] :b:"], ["first", None], expected, strict=True)
    ]
    alone = json.loads(run(artifact, "--prompt", "hello", "--json").out)
    assert (alone[0]["adapter"], len(alone)) == (None, 1)


def test_faults_on_the_command_line(run: Run, artifact: Path, tenants: Path) -> None:
    done = run(artifact, "--prompt", "hello", "--adapter", "third")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("UnknownAdapterError: adapter 'third' is not loaded; 2 are")
    done = run(artifact, "--prompt", "a", "--prompt", "b", "--adapter", "first")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("InputError: adapters names 1 rows, but the inputs have 2")
    done = run(tenants, "--prompt", "a")
    assert (done.code, done.out) == (5, "")
    assert "its kind is 'layers'" in done.err


def test_the_defaults_of_a_decoder_are_shown(artifact: Path, generator: TextGenerator) -> None:
    shown = CliRunner().invoke(cli.app, ["inspect", str(artifact), "--json"])
    defaults = json.loads(shown.output)["generation"]
    assert defaults == json.loads(json.dumps(asdict(generator.defaults)))
    assert (defaults["temperature"], defaults["ends"]) == (0.0, [EOS])
    assert "repetition_penalty: 1" in CliRunner().invoke(cli.app, ["inspect", str(artifact)]).output
