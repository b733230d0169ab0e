"""A file, variables and flags -> Settings; a flag goes before a variable, that before the file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec

from loraexport_runtime.contract.strict_yaml import Format, Lines, Problem, read_yaml
from loraexport_runtime.errors import quoted

from ..errors import SettingsError
from .check import find_problems, hints
from .schema import ModelSettings, Settings, models_of

PREFIX = "LORAEXPORT_"
FILE_VARIABLE = "LORAEXPORT_CONFIG"
SECRETS = ("LORAEXPORT_API_KEYS", "LORAEXPORT_ADMIN_TOKEN")
"""Variables that are no setting: `auth` reads them, and no flag says them."""
SETTINGS = Format(
    "a settings file, as examples/serve/settings.yaml",
    "--help lists the keys",
    SettingsError,
    "a settings file",
)
_OTHERS = ("LORAEXPORT_DEBUG",)


def read_settings(
    file: Path | None, variables: Mapping[str, str], flags: Mapping[str, Any]
) -> Settings:
    """The settings of a server.

    Args:
        file: YAML; default: what the variable LORAEXPORT_CONFIG names, if it is set.
        variables: the process's environment.
        flags: texts by key, those that were given.

    Raises:
        SettingsError: with every problem of whichever of them has one first.
    """
    if file is None and variables.get(FILE_VARIABLE):
        file = Path(variables[FILE_VARIABLE])
    data: dict[str, Any] = {}
    lines: Lines = {}
    if file is not None:
        read, lines, problems = read_yaml(file, SETTINGS)
        whole = read if isinstance(read, dict) else None
        if whole is None:
            problems.append(Problem(1, "", f"expected a mapping, got {quoted(read)}"))
            raise SettingsError(str(file), problems)
        # Models may come by a flag; all else is held to what it has to be as it stands.
        filled = {"models": {"none": "none"}} | _tuples(whole)
        problems += find_problems(filled, Settings, lines)
        if problems:
            raise SettingsError(str(file), problems)
        data = whole
    data |= _of_variables(variables)
    data |= _of_texts(flags, lambda key: f"--{key.replace('_', '-')}")
    if "models" not in data:
        raise SettingsError(
            "models", [Problem(1, "models", "no artifact", "name one: loraexport-serve FOLDER")]
        )
    try:
        settings = msgspec.convert(data, Settings, strict=True)
    except msgspec.ValidationError as error:
        raise SettingsError("settings", [Problem(1, "", str(error))]) from error
    _check_sense(settings)
    return settings


def read_models(words: list[str]) -> dict[str, str]:
    """`name=folder`, or a folder whose own name is the artifact's."""
    models: dict[str, str] = {}
    for word in words:
        name, has_name, path = word.partition("=")
        if not has_name:
            name, path = Path(word).resolve().name, word
        if name in models:
            raise SettingsError("models", [Problem(1, name, "two artifacts of one name")])
        models[name] = path
    return models


def _of_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    given = {}
    for name, text in variables.items():
        if not name.startswith(PREFIX) or name in (*SECRETS, *_OTHERS, FILE_VARIABLE):
            continue
        given[name.removeprefix(PREFIX).lower()] = text
    if "models" in given:
        given["models"] = read_models(re.split(r"[\s,]+", given["models"].strip()))  # type: ignore[assignment]
    return _of_texts(given, lambda key: PREFIX + key.upper())


def _of_texts(texts: Mapping[str, Any], shown: Any) -> dict[str, Any]:
    """Values out of texts, each as its key's type reads it."""
    types, values, problems = hints(Settings), {}, []
    for key, text in texts.items():
        if key not in types:
            problems.append(Problem(1, shown(key), "unknown", "--help lists them"))
            continue
        plain: Any = text
        if isinstance(text, str) and _is_list(types[key]):
            plain = [part for part in text.split(",") if part]
        try:
            value = msgspec.convert(plain, types[key], strict=False)
        except msgspec.ValidationError as error:
            message = f"{str(error).partition(' - at')[0].lower()}, got {quoted(text)}"
            problems.append(Problem(1, shown(key), message))
            continue
        values[key] = msgspec.to_builtins(value)
    if problems:
        raise SettingsError("settings", problems)
    return values


def _is_list(kind: Any) -> bool:
    return any(get_origin(one) is tuple for one in (kind, *get_args(kind)))


def _tuples(data: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in data.items()}


def _check_sense(settings: Settings) -> None:
    """What no single key shows. Raises SettingsError."""
    problems = []
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        problems.append(
            Problem(1, "tls_key", "a certificate and its key go together", "give both or neither")
        )
    if settings.tls_client_ca is not None and settings.tls_certificate is None:
        problems.append(Problem(1, "tls_client_ca", "needs tls_certificate and tls_key"))
    if settings.admin_port is not None and settings.admin_socket is not None:
        problems.append(Problem(1, "admin_socket", "give either this or admin_port"))
    if settings.allow_adapter_updates and not settings.adapter_roots:
        problems.append(
            Problem(
                1,
                "adapter_roots",
                "allow_adapter_updates needs the folders that adapters may come from",
                "name them",
            )
        )
    for name, model in models_of(settings).items():
        problems += _model_problems(name, model)
    if problems:
        raise SettingsError("settings", problems)


def _model_problems(name: str, model: ModelSettings) -> list[Problem]:
    place = f"models.{name}"
    if len(set(model.dimensions)) < len(model.dimensions):
        return [Problem(1, f"{place}.dimensions", "a length is given twice")]
    return []
