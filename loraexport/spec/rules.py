"""What no single key shows."""

from typing import Any

from loraexport_runtime.contract.strict_yaml import Lines, Problem, dotted
from loraexport_runtime.errors import quoted


def cross_problems(data: Any, lines: Lines) -> list[Problem]:
    """What no single key shows: names given twice, two sources of one thing, or none."""
    base = _get(data, "base")
    layers = _items(base, "layers")
    problems = _same_names(_items(data, "adapters"), ("adapters",), lines)
    problems += _reserved_names(_items(data, "adapters"), lines)
    problems += _same_names(layers, ("base", "layers"), lines)
    problems += _model_keys(data, lines)
    if isinstance(base, dict) and base.get("kind") in (None, "layers"):
        sources = [key for key in ("path", "init") if base.get(key) is not None]
        if len(sources) != 1:
            seen = "both are given" if sources else "neither is given"
            hint = "path for real weights, init: {seed: 0} for synthetic ones"
            message = f"give either path or init; {seen}"
            problems.append(Problem(lines.get(("base",), 1), "base", message, hint))
    for index, layer in enumerate(layers):
        place = ("base", "layers", index)
        slices = _items(layer, "slices")
        problems += _same_names(slices, (*place, "slices"), lines)
        keys = [
            key
            for key in ("out_features", "site", "weight", "bias")
            if _get(layer, key) is not None and slices
        ]
        for key in keys:
            at = (*place, key)
            message = f"{key} beside slices"
            hint = "move it into each of the slices"
            problems.append(Problem(lines[at], dotted(at), message, hint))
    return problems


def _model_keys(data: Any, lines: Lines) -> list[Problem]:
    """Keys that only whole models have a place for, and those that exclude each other."""
    hints = {
        ("sites",): "remove it; every listed layer is a site",
        ("features",): "remove it, or take the whole model as base.kind: transformers",
        ("export", "blend"): "remove it, or take the whole model as base.kind: transformers",
        ("export", "packed"): "remove it, or take the whole model as base.kind: transformers",
    }
    problems = []
    kind = _get(_get(data, "base"), "kind")
    if kind in ("causal_lm", "onnx"):
        del hints[("sites",)], hints[("export", "blend")]
    if kind == "causal_lm":
        del hints[("features",)]
    if kind in ("layers", "causal_lm", "onnx"):
        for place, hint in hints.items():
            value = data
            for key in place:
                value = _get(value, key)
            if value is not None and value is not False:
                problems.append(Problem(lines[place], dotted(place), "for whole models only", hint))
    export = _get(data, "export")
    base = _get(data, "base")
    if _get(export, "dtype") == "bfloat16":
        at = ("export", "dtype")
        messages = {
            "int4 weights beside bfloat16": _get(base, "weights") == "int4",
            "an ONNX graph in bfloat16, which no CPU can be the reference for": kind == "onnx",
        }
        for message, is_so in messages.items():
            if is_so:
                hint = "take float16 or float32"
                problems.append(Problem(lines[at], dotted(at), message, hint))
    for index, rule in enumerate(_items(base, "sites") if kind == "onnx" else []):
        if isinstance(_get(rule, "site"), list) != (_get(rule, "widths") is not None):
            spot = ("base", "sites", index)
            message = "a list of sites and widths go together"
            hint = "give the outputs of each site, or one site alone"
            problems.append(Problem(lines[spot], dotted(spot), message, hint))
    if _get(export, "packed") is True:
        place = ("export", "packed")
        beside = {
            "blend": _get(export, "blend") is True,
            "bfloat16 (take float16)": _get(export, "dtype") == "bfloat16",
        }
        for setting, is_so in beside.items():
            if is_so:
                message, hint = f"packed beside {setting}", "remove one of the two"
                problems.append(Problem(lines[place], dotted(place), message, hint))
    problems += _kernel_keys(export, lines)
    strategy = _get(export, "strategy")
    if _get(export, "blend") is True and strategy not in (None, "auto", "masked"):
        message = f"{quoted(strategy)} cannot blend slots"
        hint = "remove it, or take masked"
        place = ("export", "strategy")
        problems.append(Problem(lines[place], dotted(place), message, hint))
    return problems


def _kernel_keys(export: Any, lines: Lines) -> list[Problem]:
    """What has no function that a kernel could take."""
    strategy, formats = _get(export, "strategy"), _get(export, "formats")
    beside = {
        "blend": _get(export, "blend") is True,
        f"strategy {quoted(strategy)}": strategy in ("segmented", "chunked"),
        "formats without onnx": isinstance(formats, list) and "onnx" not in formats,
    }
    if _get(export, "kernels") is not True:
        return []
    place = ("export", "kernels")
    hint = "remove one of the two: functions are of ONNX, of masked and augmented sites"
    return [
        Problem(lines[place], dotted(place), f"kernels beside {setting}", hint)
        for setting, is_so in beside.items()
        if is_so
    ]


def _reserved_names(adapters: list[Any], lines: Lines) -> list[Problem]:
    """Reports call rows without an adapter so."""
    places = [
        ("adapters", index, "name")
        for index, adapter in enumerate(adapters)
        if _get(adapter, "name") == "base"
    ]
    message, hint = "'base' stands for no adapter", "give it another name"
    return [Problem(lines[place], dotted(place), message, hint) for place in places]


def _same_names(items: list[Any], place: tuple[str | int, ...], lines: Lines) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for index, item in enumerate(items):
        name = _get(item, "name")
        if not isinstance(name, str):
            continue
        at = (*place, index, "name")
        if name in first:
            message = f"two are named {quoted(name)}, the first on line {first[name]}"
            problems.append(Problem(lines[at], dotted(at), message, "give each its own name"))
        first.setdefault(name, lines[at])
    return problems


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None


def _items(data: Any, key: str) -> list[Any]:
    value = _get(data, key)
    return value if isinstance(value, list) else []
