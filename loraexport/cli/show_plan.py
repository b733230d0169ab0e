"""A Plan as a table for people and as a dictionary for programs."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..plan.layer import LayerPlan
from ..plan.model import ModelPlan
from ..plan.plan import AnyPlan
from .console import make_table, print_line

_NAMED = 4


def plan_dict(plan: AnyPlan) -> dict[str, Any]:
    """Everything that `print_plan` shows, as JSON types."""
    return {
        "name": plan.spec.name,
        "base": plan.base_source,
        "dtype": plan.spec.export.dtype,
        "slots": plan.num_slots,
        "max_rank": plan.max_rank,
        "tokens": plan.spec.typical_tokens,
        "adapters": [
            {
                "name": adapter.name,
                "slot": adapter.slot,
                "sites": {
                    site: {"rank": adapter_site.rank, "scaling": adapter_site.scaling}
                    for site, adapter_site in adapter.sites.items()
                },
            }
            for adapter in plan.adapters
        ],
        "layers": [_layer_dict(layer, plan.spec.typical_tokens) for layer in plan.layers],
        **_tensors(plan),
        "missing": list(plan.missing),
    }


def describe_missing(names: Sequence[str]) -> str | None:
    """One line that names the weights that a base's files lack; None if they lack none."""
    if not names:
        return None
    some = ", ".join(names[:_NAMED]) + (f", … ({len(names)} in all)" if len(names) > _NAMED else "")
    return (
        f"the base's files lack {some}: no row needs them without an adapter that brings them, and"
        " the base's digest leaves them out"
    )


def print_plan(plan: AnyPlan, console: Console) -> None:
    """Adapters, layers and their sites, one line each, and why each strategy."""
    data = plan_dict(plan)
    print_line(
        console,
        f"{data['name']}: {data['dtype']}, {data['slots']} slots of rank {data['max_rank']},"
        f" base {data['base']}",
    )
    if isinstance(plan.kind, ModelPlan):
        print_line(console, f"Inputs: {', '.join(map(str, plan.kind.inputs))}")
        print_line(console, f"Outputs: {', '.join(map(str, plan.kind.outputs))}")
    console.print(_adapter_table(data["adapters"]))
    console.print(_layer_table(data["layers"], data["tokens"]))
    if plan.spec.base.kind == "layers":  # the sites of a whole model are its rows above
        print_line(console, "Sites:")
        for layer in data["layers"]:
            print_line(console, f"  {layer['name']}: {', '.join(layer['sites'])}")
    shared = Counter(_pattern(layer["name"]) for layer in data["layers"] if len(layer["sites"]) > 1)
    if plan.spec.base.kind != "layers" and shared:
        # The products of a graph that is grafted are as they were, and slices may have one each.
        one_each = any(layer["stacks"].count("lora_B") > 1 for layer in data["layers"])
        is_one = plan.spec.base.kind == "transformers" and not one_each
        products = " and one base product" if is_one else ""
        print_line(console, f"One input, so one shrink{products} for all:")
        for name, count in shared.items():
            print_line(console, f"  {name} ({count} times)")
    missing = describe_missing(data["missing"])
    if missing:
        print_line(console, f"Note: {missing}.")
    print_line(console, "Strategies:")
    reasons = _reasons(data["layers"])
    for reason, names in reasons.items():
        which = ", ".join(names) if len(reasons) > 1 or len(names) < 5 else "all of them"
        print_line(console, f"  {reason} ({which})")


def _tensors(plan: AnyPlan) -> dict[str, Any]:
    """What a whole model takes and gives; of an existing graph only a build reads it."""
    if not isinstance(plan.kind, ModelPlan):
        return {}
    return {
        key: [{"name": entry.name, "dtype": entry.dtype, "shape": [*entry.shape]} for entry in part]
        for key, part in (("inputs", plan.kind.inputs), ("outputs", plan.kind.outputs))
    }


def _adapter_table(adapters: list[dict[str, Any]]) -> Table:
    table = make_table("adapter", "slot", "sites", "ranks", "scalings")
    for adapter in adapters:
        sites = adapter["sites"].values()
        ranks = sorted({site["rank"] for site in sites})
        scalings = sorted({round(site["scaling"], 6) for site in sites})
        slot = "not loaded" if adapter["slot"] is None else str(adapter["slot"])
        table.add_row(adapter["name"], slot, str(len(sites)), _join(ranks), _join(scalings))
    return table


def _layer_table(layers: list[dict[str, Any]], tokens: int) -> Table:
    costs = ("MiB\nbase + LoRA", f"GFLOP, {tokens} tokens\nbase + LoRA")
    table = make_table("layer", "in", "out", "stack", "strategy", *costs)
    for layer in layers:
        table.add_row(
            layer["name"],
            str(layer["in_features"]),
            str(layer["out_features"]),
            str(layer["stack_width"]),
            layer["strategy"],
            f"{layer['base_bytes'] / 2**20:.2f} + {layer['lora_bytes'] / 2**20:.2f}",
            f"{layer['base_flops'] / 1e9:.3f} + {layer['lora_flops'] / 1e9:.3f}",
        )
    return table


def _layer_dict(planned: LayerPlan, tokens: int) -> dict[str, Any]:
    layer, b = planned.layer, planned.layer.stack("lora_B")
    return {
        "name": layer.name,
        "kind": layer.kind,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "sites": [part.site for part in layer.slices],
        "stack_width": b.shape[0] - b.row_offset if b else 0,
        "stacks": [stack.role for stack in layer.stacks],
        "strategy": layer.strategy,
        "reason": planned.strategy_reason,
        "base_bytes": planned.base_bytes,
        "lora_bytes": planned.lora_bytes,
        "base_flops": planned.base_flops_per_token * tokens,
        "lora_flops": planned.lora_flops_per_token * tokens,
    }


def _reasons(layers: list[dict[str, Any]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for layer in layers:
        grouped.setdefault(f"{layer['strategy']}: {layer['reason']}", []).append(layer["name"])
    return grouped


def _pattern(name: str) -> str:
    """A layer's name with its numbers left open, which most of a model's have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _join(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)
