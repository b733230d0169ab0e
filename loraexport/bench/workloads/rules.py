"""What no single key of a workload shows: lengths that do not fit, values that no config has."""

from collections.abc import Sequence
from typing import Any

from loraexport_runtime.contract.strict_yaml import Lines, Problem, dotted

_PARTS = ("traffic", "arrival", "chat")
"""What a workload of kind engine may measure."""


def cross_problems(data: Any, lines: Lines, kinds: Sequence[str]) -> list[Problem]:
    """Every such problem of a file of workloads.

    Args:
        kinds: that a workload may have.
    """
    problems: list[Problem] = []
    items = data.get("workloads") if isinstance(data, dict) else None
    first: dict[str, int] = {}
    for index, item in enumerate(items if isinstance(items, list) else []):
        if not isinstance(item, dict):
            continue
        place = ("workloads", index)
        name = item.get("name")
        if isinstance(name, str) and name in first:
            line, path = lines[(*place, "name")], dotted((*place, "name"))
            message = f"two are named {name!r}, the first on line {first[name]}"
            problems.append(Problem(line, path, message, "give each its own name"))
        if isinstance(name, str):
            first.setdefault(name, lines[(*place, "name")])
        if "kind" not in item:
            path = dotted((*place, "kind"))
            hint = f"add one of {', '.join(f'kind: {kind}' for kind in kinds)}"
            problems.append(Problem(lines[place], path, "required key is missing", hint))
        chain = item.get("chain")
        if (
            isinstance(chain, int)
            and chain > 1
            and item.get("in_features") != item.get("out_features")
        ):
            message = f"{chain} layers of which each takes what the one before it gives"
            hint = "make in_features and out_features equal, or leave chain out"
            at = (*place, "chain")
            problems.append(Problem(lines[at], dotted(at), message, hint))
        if item.get("weights") == "int4" and data.get("dtype") == "bfloat16":
            at = (*place, "weights")
            message, hint = "int4 weights beside bfloat16", "take float16 or float32"
            problems.append(Problem(lines[at], dotted(at), message, hint))
        if item.get("kind") == "engine":
            problems += _engine_problems(item, place, lines)
        if isinstance(item.get("config"), dict):
            problems += _config_problems(item["config"], (*place, "config"), lines)
    return problems


def _engine_problems(
    item: dict[str, Any], place: tuple[str | int, ...], lines: Lines
) -> list[Problem]:
    """A workload that measures nothing, and lengths that end before they begin."""
    problems = []
    if not item.keys() & set(_PARTS):
        message, hint = "nothing to measure", f"add one of {', '.join(_PARTS)}"
        problems.append(Problem(lines[place], dotted(place), message, hint))
    traffic = item.get("traffic")
    for key, bounds in (traffic if isinstance(traffic, dict) else {}).items():
        numbers = isinstance(bounds, list) and all(isinstance(one, int) for one in bounds)
        if numbers and len(bounds) == 2 and bounds[0] > bounds[1]:
            at = (*place, "traffic", key)
            message = f"the shortest is {bounds[0]}, and the longest {bounds[1]}"
            problems.append(Problem(lines[at], dotted(at), message, "write the smaller one first"))
    return problems


def _config_problems(
    config: dict[str, Any], place: tuple[str | int, ...], lines: Lines
) -> list[Problem]:
    """transformers takes any key of a config without a word; here a typo is an error."""
    import difflib

    import transformers

    kind = config.get("model_type")
    if kind is None:
        hint = "add it, as model_type: bert"
        path = dotted((*place, "model_type"))
        return [Problem(lines[place], path, "required key is missing", hint)]
    try:
        defaults = transformers.AutoConfig.for_model(kind).to_dict()
    except ValueError:
        at = (*place, "model_type")
        message = f"transformers {transformers.__version__} knows no model of type {kind!r}"
        return [Problem(lines[at], dotted(at), message, "write it as a config.json does")]
    problems = []
    for key in sorted(set(config) - set(defaults)):
        near = difflib.get_close_matches(key, defaults, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the config of {kind} has no such key"
        at = (*place, key)
        problems.append(Problem(lines[at], dotted(at), "unknown key", hint))
    return problems
