"""Settings come of a file, variables and flags; every problem is told, with its line."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

import loraexport_runtime
from loraexport_runtime.errors import ArtifactError
from loraexport_serve import ModelSettings, Settings, SettingsError, read_settings
from loraexport_serve.auth import read_keys
from loraexport_serve.cli import main
from loraexport_serve.config.flags import make_parser
from loraexport_serve.config.reader import read_models
from loraexport_serve.config.schema import models_of
from loraexport_serve.errors import ApiError
from loraexport_serve.hosts import opening

FILE = """
models:
  a: artifacts/a
  b:
    path: artifacts/b
    pinned: [sql]
    warm_up: [[8, 32], [1, 8]]
port: 9000
batch_delay: 0.5
adapter_roots: [adapters, more]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_a_flag_goes_before_a_variable_before_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, FILE)
    variables = {"LORAEXPORT_PORT": "9001", "LORAEXPORT_LOG_FORMAT": "json", "PATH": "/bin"}
    variables |= {"LORAEXPORT_BATCH_DELAY": "0.25", "LORAEXPORT_API_KEYS": "no setting"}
    settings = read_settings(file, variables, {"port": "9002", "adapter_roots": "x,y"})
    assert (settings.port, settings.log_format, settings.batch_delay) == (9002, "json", 0.25)
    assert settings.adapter_roots == ("x", "y")
    models = models_of(settings)
    assert models["a"] == ModelSettings(path="artifacts/a")
    assert models["b"].warm_up == ((8, 32), (1, 8))
    named = read_settings(None, variables | {"LORAEXPORT_CONFIG": str(file)}, {})
    assert (named.port, named.adapter_roots) == (9001, ("adapters", "more"))


def test_artifacts_by_words() -> None:
    assert read_models(["x=a/b", "c/d"]) == {"x": "a/b", "d": "c/d"}
    with pytest.raises(SettingsError, match="two artifacts of one name"):
        read_models(["x=a", "x=b"])
    variables = {"LORAEXPORT_MODELS": "x=a/b, c/d", "LORAEXPORT_ALLOW_UNKNOWN": "1"}
    with pytest.raises(SettingsError, match="LORAEXPORT_ALLOW_UNKNOWN: unknown"):
        read_settings(None, variables, {})
    settings = read_settings(None, {"LORAEXPORT_MODELS": "x=a/b, c/d"}, {})
    assert settings.models == {"x": "a/b", "d": "c/d"}


def test_every_key_is_a_flag_but_the_keys_of_clients() -> None:
    parser = make_parser()
    words = [word for action in parser._actions for word in action.option_strings]
    for field in msgspec.structs.fields(Settings):
        assert field.name == "models" or f"--{field.name.replace('_', '-')}" in words
    for kind in (Settings, ModelSettings):
        names = {field.name for field in msgspec.structs.fields(kind)}
        assert not names & {"key", "keys", "api_key", "api_keys", "admin_token", "token"}
    with pytest.raises(SystemExit):
        parser.parse_args(["a", "--api-key", "x"])
    given = vars(parser.parse_args(["a", "--port", "1", "--allow-adapter-updates"]))
    given = {key: value for key, value in given.items() if value is not None}
    assert given == {"models": ["a"], "port": "1", "allow_adapter_updates": True}


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["1: the file is empty"]),
        ("- a", ["1: expected a mapping"]),
        ("models: {a: x}\nprot: 1", ["2: prot: unknown key (did you mean 'port'?)"]),
        ("models: {a: x}\nport: 1\nport: 2", ["3: port: duplicate key"]),
        ("models: {a: x}\nport: '80'", ["2: port: expected `int`, got `str`"]),
        ("models: {a: x}\nport: 70000", ["2: port: expected `int` <= 65535"]),
        ("models: {a: x}\ntls_key: k", ["tls_key: a certificate and its key go together"]),
        ("models: {a: x}\ntls_client_ca: k", ["tls_client_ca: needs tls_certificate"]),
        (
            "models: {a: x}\nadmin_port: 1\nadmin_socket: s",
            ["give either this or admin_port"],
        ),
        ("models: {a: x}\nallow_adapter_updates: true", ["adapter_roots: allow_adapter_updates"]),
        ("models: {}", ["1: models: expected `object` of length >= 1"]),
        ("models: {.a: x}", ["models: expected `str` matching regex"]),
        ("port: 1", ["models: no artifact (name one: loraexport-serve FOLDER)"]),
        (
            "models:\n  a:\n    path: x\n    paht: y\n    threads: 0\n  b: {}\n  c: 3\nhost: 1",
            [
                "4: models.a.paht: unknown key (did you mean 'path'?)",
                "5: models.a.threads: expected `int` >= 1",
                "6: models.b.path: required key is missing (add it)",
                "7: models.c: expected `str | object`",
                "8: host: expected `str`, got `int`",
            ],
        ),
        ("models: {a: {path: x, dimensions: [8, 8]}}", ["models.a.dimensions: a length is given"]),
        ("models: !!python/object:os.system {}", ["is not allowed in a settings file"]),
    ],
)
def test_every_problem_with_its_line(tmp_path: Path, text: str, problems: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        read_settings(file, {}, {})
    shown = str(caught.value)
    for problem in problems:
        assert problem in shown
    assert len(caught.value.problems) == len(problems)


def test_texts_that_are_no_values() -> None:
    flags = {"port": "x", "batch_delay": "1000", "models": {"a": "x"}, "device": "tpu"}
    with pytest.raises(SettingsError) as caught:
        read_settings(None, {"LORAEXPORT_PROT": "1"}, {})
    assert "LORAEXPORT_PROT" in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        read_settings(None, {}, flags)
    for flag in ("--port", "--batch-delay", "--device"):
        assert flag in str(caught.value)


def settings(**keys: Any) -> Settings:
    return Settings(models={"a": "x"}, **keys)


def test_keys_of_a_file_and_of_variables(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n  - {name: a, key: 0123456789abcdef, adapters: [sql, 'm:chat']}\n")
    variables = {"LORAEXPORT_API_KEYS": "another-key-of-16, and-one-more-of-16"}
    keys = read_keys(settings(keys_file=str(file)), variables)
    restricted = keys.caller("Bearer 0123456789abcdef")
    assert (restricted.name, restricted.tenant) == ("a", "a")
    assert restricted.may_use("m", "sql")
    assert restricted.may_use("m", "chat")
    assert not restricted.may_use("n", "chat")
    free = keys.caller("bearer  another-key-of-16")
    assert (free.name, free.tenant, free.may_use("n", "chat")) == ("key0", None, True)
    for given in (None, "", "Bearer", "Bearer ", "Basic x", "Bearer 0123456789abcdeF", "x" * 10**5):
        with pytest.raises(ApiError) as caught:
            keys.caller(given)
        assert caught.value.status == 401


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys:\n  - {name: a, key: short}", "length >= 16"),
        ("keys:\n  - {name: a, key: 0123456789 secret}", "matching regex"),
        ("keys:\n  - {name: a}", "keys"),
        ("keys:\n  - {name: a, key: 0123456789secret, admin: yes}", "keys"),
        ("kyes: []", "did you mean 'keys'?"),
        (
            "keys:\n  - {name: a, key: 0123456789secret}\n  - {name: a, key: 0123456789secre2}",
            "two keys of one name",
        ),
        (
            "keys:\n  - {name: a, key: 0123456789secret}\n  - {name: b, key: 0123456789secret}",
            "two keys are alike",
        ),
    ],
)
def test_a_file_of_keys_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    """And no message quotes a key."""
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_keys(settings(keys_file=str(file)), {})
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_port_of_operators_needs_a_token(tmp_path: Path) -> None:
    for keys in ({"admin_port": 0}, {"admin_socket": "s"}):
        with pytest.raises(SettingsError, match="operators have no token"):
            read_keys(settings(**keys), {})
        assert read_keys(settings(**keys), {"LORAEXPORT_ADMIN_TOKEN": "x" * 16}).has_admin
    with pytest.raises(SettingsError, match="less than 16"):
        read_keys(settings(), {"LORAEXPORT_ADMIN_TOKEN": "x"})
    with pytest.raises(SettingsError, match="no text that can be read"):
        read_keys(settings(admin_token_file=str(tmp_path / "none")), {})


def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([]) == 2
    assert "no artifact" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    monkeypatch.setenv("LORAEXPORT_PORT", "x")
    assert main(["a"]) == 2
    assert "LORAEXPORT_PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("server", "model", "asked"),
    [
        ("auto", None, "auto"),
        ("required", None, True),
        ("never", None, False),
        ("never", "required", True),
        ("required", "auto", "auto"),
    ],
)
def test_kernels_of_a_model_go_before_the_servers(
    monkeypatch: pytest.MonkeyPatch, small: Path, server: str, model: str | None, asked: object
) -> None:
    """What `load` is asked for; single layers are refused once they are open."""
    given: list[object] = []

    def load(path: str, providers: list[str], **options: Any) -> Any:
        given.append(options["kernels"])
        return loraexport_runtime.load(path, providers)

    monkeypatch.setattr(opening, "load", load)
    one = msgspec.convert({"path": str(small), "kernels": model}, ModelSettings)
    settings = read_settings(None, {"LORAEXPORT_KERNELS": server}, {"models": {"a": str(small)}})
    with pytest.raises(ArtifactError, match="it holds single layers"):
        asyncio.run(opening.open_host("a", one, settings))
    assert given == [asked]
    with pytest.raises(SettingsError, match="kernels"):
        read_settings(None, {}, {"models": {"a": str(small)}, "kernels": "on"})
