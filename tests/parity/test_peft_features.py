"""PEFT's features on whole models, each held to PEFT in mixed batches.

A feature counts by two proofs: the build's own parity, and the runtime's mixed batch against plain
models into which PEFT has merged one adapter each. The docs' table is `FEATURES`.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from support.peft_features import (
    BERT,
    FEATURES,
    GPT2,
    IMPLEMENTATIONS,
    LENGTHS,
    PEFTS_WORST,
    PROVEN,
    ROBERTA,
    ROOT,
    Feature,
    World,
    assert_is_peft,
    error_of,
    make_inputs,
    run,
    run_plain,
)

from loraexport_runtime import (
    AdapterConfigError,
)
from loraexport_runtime.adapters.config import FIELDS, Refused, read_lora_config

# PEFT says of an embedding LoRA that it saves the embedding too; of lora_bias that it cannot be
# merged into a layer without a bias, and, wrongly, that its tensors are shards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning"),
]


def test_the_docs_list_these_features() -> None:
    text = (ROOT / "docs/reference/peft.md").read_text(encoding="utf-8")
    section = text.split("\n## Support\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    rows = [
        "| feature | in a mixed batch | PEFT's own mixed batch | note |",
        "| --- | --- | --- | --- |",
    ]
    rows += [f"| {one.name} | {one.in_batch} | {one.peft} | {one.note} |" for one in FEATURES]
    assert table == rows, "write this into docs/reference/peft.md:\n" + "\n".join(rows)


def test_the_table_names_every_refused_field() -> None:
    listed = {name for feature in FEATURES for name in feature.refused}
    refused = {name for name, rule in FIELDS.items() if isinstance(rule, Refused)}
    assert listed == refused | {"init_lora_weights", "modules_to_save"}


@pytest.mark.parametrize("key", PROVEN)
def test_a_feature_is_proven_in_a_mixed_batch(world: World, key: str) -> None:
    base, name = key.split("/")
    data = json.loads((world.artifact(base) / "parity/parity.json").read_text())
    assert data["status"] == "passed"
    gains = {row["implementation"]: row["gain"] for row in data["rows"] if row["adapter"] == name}
    assert set(gains) >= set(IMPLEMENTATIONS)  # more where there is a CUDA device
    assert list(gains.values()) == pytest.approx([1] * len(gains), abs=1e-3)

    headless = base == "roberta"
    partners = ["head", "wide_head"] if headless else ["plain", None]
    assert_is_peft(world, world.session(base), base, [name, *partners, name])


def test_all_features_share_one_batch(world: World) -> None:
    for base, keys in (("bert", BERT), ("gpt2", GPT2)):
        names: list[str | None] = [key.split("/")[1] for key in keys]
        assert_is_peft(world, world.session(base), base, [*names, None])


def test_the_adapters_are_where_their_configs_say(world: World) -> None:
    adapters = world.session("bert").list_adapters()
    ranks = {name: adapters[name].ranks for name in ("patterns", "layers", "rslora")}
    assert set(ranks["patterns"].values()) == {1, 2, 3}
    patterns = " ".join(ranks["patterns"])
    assert "key" in patterns
    assert not {"value", "pooler", "classifier"} & set(patterns.replace(".", " ").split())
    assert {site.split(".")[3] for site in ranks["layers"]} == {"1"}
    assert len(ranks["layers"]) == 4
    assert set(ranks["rslora"].values()) == {3}


@pytest.mark.parametrize(
    "feature", [one for one in FEATURES if one.proof], ids=lambda one: one.name
)
def test_what_pefts_own_mixed_batch_gives(world: World, feature: Feature) -> None:
    """One batch of the feature's adapters, a plain one and the base, through `adapter_names`."""
    base = feature.proof[0].split("/")[0]
    keys = [key for key in feature.proof if key.startswith(base)]
    beside = [] if base == "roberta" else [f"{base}/plain"]
    bare = "bare model" in feature.name
    outcome = _pefts_outcome(world, base, list(dict.fromkeys([*beside, *keys])), bare)
    if feature.peft == "if every adapter has one":
        assert outcome == "error"
        outcome = {"yes": feature.peft}.get(_pefts_outcome(world, base, keys, bare), "not even so")
    assert outcome == feature.peft


def _pefts_outcome(world: World, base: str, keys: list[str], bare: bool) -> str:
    model = world.load(f"{base}/")
    names = [key.split("/")[1] for key in keys]
    rows = [*names, *([] if base == "roberta" else ["__base__"])]
    inputs = make_inputs(world.session(base), base, [LENGTHS[row % 4] for row in range(len(rows))])
    try:
        with warnings.catch_warnings(action="ignore"):
            plain = model.transformer if bare else model
            wrapped = PeftModel.from_pretrained(plain, str(world.adapter(keys[0])), names[0])
            for key, name in zip(keys[1:], names[1:], strict=True):
                wrapped.load_adapter(str(world.adapter(key)), name)
            found = run_plain(wrapped.eval(), inputs, adapter_names=rows)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError):
        return "error"
    errors = []
    for row, name in enumerate(rows):
        key = f"{base}/{'' if name == '__base__' else name}"
        expected = run_plain(world.merged(key), inputs)[row]
        errors.append(error_of(found[row], expected, inputs["attention_mask"][row]))
    return "yes" if max(errors) < PEFTS_WORST else "wrong numbers"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key}-{value}")
        for feature in FEATURES
        for key, values in feature.refused.items()
        for value in (values if key == "init_lora_weights" else [values])
        if key != "modules_to_save"
    ],
)
def test_a_refused_field_is_refused_by_name(
    world: World, tmp_path: Path, key: str, value: Any
) -> None:
    plain = json.loads((world.adapter("bert/plain") / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, key: value}))
    with pytest.raises(AdapterConfigError) as caught:
        read_lora_config(tmp_path)
    assert f"{key} = {value!r}" in str(caught.value)
    rule = FIELDS[key]
    if isinstance(rule, Refused):
        assert rule.reason in str(caught.value)


def test_a_row_does_not_depend_on_the_other_rows(world: World) -> None:
    for base, keys in (("bert", BERT), ("gpt2", GPT2), ("roberta", ROBERTA)):
        session = world.session(base)
        inputs = make_inputs(session, base)
        names = [key.split("/")[1] for key in keys]
        mixed = [(names * 4)[index : index + 4] for index in range(0, len(names), 4)]
        for batch in mixed:
            y = run(session, inputs, batch)
            for row, name in enumerate(batch):
                alone = run(session, inputs, [name] * 4)[row]
                assert y[row].tobytes() == alone.tobytes(), f"{base}, row {row}, {name}"
