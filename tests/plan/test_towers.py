"""Adapters of a part of a model: by the names of the whole, and not by those of another part."""

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from support.adapters import write_adapter
from support.builds import Project
from support.families import AUDIO_EMBEDDING, FAMILIES, FEATURES, TEXT_EMBEDDING

from loraexport.hf.quiet import quiet_models
from loraexport.plan.model import ModelPlan
from loraexport.plan.plan import Plan, make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.errors import AdapterError

_CLIP = "encoder.layers.0.self_attn.q_proj"
_CLAP = "audio_model.audio_encoder.layers.0.blocks.0.attention.self.query"


@pytest.mark.parametrize(
    ("family", "whole", "task", "own", "other", "width"),
    [
        ("CLIP (text)", tf.CLIPModel, TEXT_EMBEDDING, f"text_model.{_CLIP}", "vision_model", 32),
        (
            "SigLIP (text)",
            tf.SiglipModel,
            TEXT_EMBEDDING,
            f"text_model.{_CLIP}",
            "vision_model",
            32,
        ),
        ("SigLIP (vision)", tf.SiglipModel, FEATURES, f"vision_model.{_CLIP}", "text_model", 32),
        ("CLAP (audio)", tf.ClapModel, AUDIO_EMBEDDING, _CLAP, "text_model", 16),
        (
            "Whisper (encoder)",
            tf.WhisperForConditionalGeneration,
            FEATURES,
            "model.encoder.layers.0.self_attn.q_proj",
            "model.decoder",
            32,
        ),
    ],
)
def test_names_of_the_whole(
    family: str, whole: Any, task: str, own: str, other: str, width: int, tmp_path: Path
) -> None:
    with quiet_models():
        whole(FAMILIES[family].config()).save_pretrained(tmp_path / "base")
    sound = '{"sampling_rate": 100, "max_length_s": 10, "hop_length": 8}'
    (tmp_path / "base/preprocessor_config.json").write_text(sound)
    plan = _plan(tmp_path, task, own, width)
    assert isinstance(plan.kind, ModelPlan)
    (site,) = plan.adapters[0].modules
    assert own.endswith(site)
    wrong = f"{other}.{own.partition('encoder.' if 'model.encoder' in own else 'model.')[2]}"
    with pytest.raises(AdapterError):
        _plan(tmp_path, task, wrong, width)


def _plan(folder: Path, task: str, module: str, width: int) -> Plan[Any]:
    write_adapter(folder / "sql", {module: (width, width)})
    base = {"kind": "transformers", "path": "base", "task": task}
    spec = Project(folder).spec(base=base, adapters=[{"name": "sql", "path": "sql"}])
    return make_plan(read_spec(spec), folder)
