"""Adapters of another model, or of another part of this one, whose modules are called alike.

Each has the shapes of the base that it is brought to, so that only names and the class that PEFT
notes can tell. PEFT itself leaves the base as it is, or would serve another part's numbers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from support.builds import Project
from support.families import FAMILIES, FEATURES, write_model
from support.families import write_spec as write_family_spec
from support.home import Home

import loraexport.plan.model as plan_model
import loraexport.plan.plan as plan_module
import loraexport_runtime
import loraexport_runtime.slots.host as host_module
from loraexport.errors import ParityError
from loraexport.hf.quiet import quiet_models
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.naming import Naming
from loraexport_runtime.errors import AdapterWeightsError

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SIZES, "patch_size": 4, "image_size": 12, "num_channels": 1}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 64}


def train(model: Any, folder: Path, targets: Any, task: str | None = None) -> None:
    """An adapter that PEFT saves of a model, with random A and B.

    Args:
        task: PEFT notes the class of the model where it has none.
    """
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type=task)
    with quiet_models():
        get_peft_model(model, config).save_pretrained(folder)


def write_towers(folder: Path, architecture: str) -> None:
    """A CLIP or SigLIP, its vision tower by itself, and adapters of its parts."""
    torch.manual_seed(0)
    if architecture == "clip":
        config: Any = tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
        whole: Any = tf.CLIPModel(config)
        towers: Any = tf.CLIPVisionModel, tf.CLIPTextModel
    else:
        config = tf.SiglipConfig(text_config=TEXT, vision_config=VISION)
        whole = tf.SiglipModel(config)
        towers = tf.SiglipVisionModel, tf.SiglipTextModel
    whole.save_pretrained(folder / "whole")
    with quiet_models():
        towers[0].from_pretrained(folder / "whole").save_pretrained(folder / "vision")
    for name, pattern in {
        "of_vision": r"vision_model.*\.q_proj",
        "of_text": r"text_model.*\.q_proj",
        "of_both": r".*\.q_proj",
    }.items():
        with quiet_models():
            model = type(whole).from_pretrained(folder / "whole")
        train(model, folder / name, pattern)
    for name, tower in zip(("bare_vision", "bare_text"), towers, strict=True):
        with quiet_models():
            model = tower.from_pretrained(folder / "whole")
        train(model, folder / name, ["q_proj"])


def write_spec(place: Path, folder: Path, base: str, adapter: str) -> Path:
    """A spec in `place` of a base and an adapter in `folder`."""
    return Project(place).spec(
        base={"kind": "transformers", "path": str(folder / base), "task": FEATURES},
        adapters=[{"name": adapter, "path": str(folder / adapter)}],
        export={"formats": ["onnx"]},
        slots=2,
    )


WRONG = {
    "of_text": "2 of 2 modules have no site .* are of 'text_model', which is not a part of",
    "of_both": "2 of 4 modules have no site .* are of 'text_model', which is not a part of this",
    "bare_text": "trained on (CLIP|Siglip)TextModel of '.*' .*, which is another part of the model",
}


@pytest.mark.parametrize("architecture", ["clip", "siglip"])
@pytest.mark.parametrize("adapter", WRONG)
def test_a_text_tower_is_no_vision_tower_at_build(
    adapter: str, architecture: str, home: Home, tmp_path: Path
) -> None:
    folder = home.project(write_towers, architecture)
    for base in ("whole", "vision") if architecture == "clip" else ("vision",):
        spec = write_spec(tmp_path, folder, base, adapter)
        with pytest.raises(AdapterWeightsError, match=WRONG[adapter]):
            make_plan(read_spec(spec), tmp_path)


def test_a_text_tower_is_no_vision_tower_at_load(home: Home, tmp_path: Path) -> None:
    """The vision tower's own is taken under either name."""
    folder = home.project(write_towers, "clip")
    artifact = home.build(write_spec(tmp_path, folder, "whole", "of_vision"))
    with loraexport_runtime.load_model(artifact) as session:
        for adapter, message in WRONG.items():
            with pytest.raises(AdapterWeightsError, match=message):
                session.load_adapter("another", folder / adapter)
        session.load_adapter("another", folder / "bare_vision")


def write_berts(folder: Path) -> None:
    """A bare BERT, and adapters of models with a head: of BERT, and of RoBERTa in its sizes."""
    torch.manual_seed(0)
    bert = tf.BertConfig(**TEXT)
    tf.BertModel(bert).save_pretrained(folder / "base")
    heads: dict[str, Any] = {
        "of_bert": tf.BertForSequenceClassification(bert),
        "of_roberta": tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT)),
        "of_bare_roberta": tf.RobertaModel(tf.RobertaConfig(**TEXT)),
    }
    for name, model in heads.items():
        task = None if "bare" in name else "FEATURE_EXTRACTION"
        train(model, folder / name, ["query", "value"], task)


ROBERTA = {
    "of_roberta": "4 of 4 modules have no site .* are of 'roberta', which is not a part of this",
    "of_bare_roberta": "trained on RobertaModel of 'roberta' .*, which is another model than this",
}


def test_a_roberta_is_no_bert(home: Home, tmp_path: Path) -> None:
    folder = home.project(write_berts)
    for adapter, message in ROBERTA.items():
        spec = write_spec(tmp_path, folder, "base", adapter)
        with pytest.raises(AdapterWeightsError, match=message):
            make_plan(read_spec(spec), tmp_path)
    artifact = home.build(write_spec(tmp_path, folder, "base", "of_bert"))
    with loraexport_runtime.load_model(artifact) as session:
        for adapter, message in ROBERTA.items():
            with pytest.raises(AdapterWeightsError, match=message):
                session.load_adapter("another", folder / adapter)


def test_a_wrong_match_is_seen_by_peft(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a name dropped that should not be, the build would not be published."""
    folder = home.project(write_berts)
    match_sites = plan_module.match_sites

    def drop_roberta(header: Any, sites: Any, naming: Naming) -> dict[str, str]:
        return match_sites(header, sites, Naming(None, ("roberta",), ()))

    for module in (plan_module, plan_model):
        monkeypatch.setattr(module, "match_sites", drop_roberta)
    with pytest.raises(ParityError, match="PEFT has nothing to compare with: no model of"):
        build(write_spec(tmp_path, folder, "base", "of_roberta"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*") if path.name[0] != "."] == []


def test_a_wrong_tower_is_seen_by_peft(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT puts it into the text tower of the whole model, and the vision tower stays."""
    folder = home.project(write_towers, "clip")
    match_sites = plan_module.match_sites

    def drop_text(header: Any, sites: Any, naming: Naming) -> dict[str, str]:
        return match_sites(header, sites, Naming(None, ("text_model",), ()))

    for module in (plan_module, plan_model, host_module):
        monkeypatch.setattr(module, "match_sites", drop_text)
    with pytest.raises(ParityError, match="Worst: peft"):
        build(write_spec(tmp_path, folder, "whole", "of_text"), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "task", "prefix"),
    [
        ("BERT", "sequence-classification", "bert"),
        pytest.param("Llama", "causal-lm", "model", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_of_the_bare_model_fits_the_headed_one(
    name: str, task: str, prefix: str, tmp_path: Path
) -> None:
    """And PEFT's own numbers for it are those of the bare model inside."""
    family = FAMILIES[name]
    write_model(family, task, tmp_path)
    with quiet_models():
        bare = tf.AutoModel.from_pretrained(tmp_path / "base")
    train(bare, tmp_path / "second", family.sites[1])
    write_family_spec(task, tmp_path, "onnx")
    artifact, report = build(tmp_path / "spec.yaml", tmp_path / "out")
    assert report.status == "passed"
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["base"]["naming"]["prefixes"][0] == prefix
    assert all(site.startswith(f"{prefix}.") for site in manifest["adapters"][1]["sites"])
