"""Numbers of a config.json that no model has are refused before anything is made of them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.adapters import write_adapter
from support.builds import Project

from loraexport.errors import BaseModelError
from loraexport.hf import limits
from loraexport.hf.limits import check_config
from loraexport.hf.skeleton import read_skeleton
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec

_FILE = Path("config.json")
_SMALL = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 10,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000, and no model has more"),
        ({"encoder": {"n_layer": 10**9}}, "n_layer is 1000000000, and no model has more than 1,0"),
        ({"depths": [2, 10**6]}, "depths is 1000000, and no model has more than 1,024"),
        ({"num_local_experts": 10**6}, "num_local_experts is 1000000, and no model has more"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, and no model has more than 131,072"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648, and no model has more"),
        ({"a": [[{"b": -(10**4000)}]]}, "b is -1000"),
    ],
)
def test_a_number_that_no_model_has(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(BaseModelError, match=r"^config\.json: .*correct it, or download") as caught:
        check_config(config, _FILE)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 500


def test_numbers_that_models_have() -> None:
    sizes = {"num_hidden_layers": 1_000, "num_experts": 16_384, "vocab_size": 262_144}
    check_config(sizes | {"max_position_embeddings": 10_485_760, "tie": True, "eps": 1e-5}, _FILE)


@pytest.mark.parametrize("kind", ["transformers", "causal_lm"])
def test_a_plan_of_100_000_layers_ends_at_once(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(_SMALL | {"num_hidden_layers": 100_000}))
    write_adapter(tmp_path / "sql", {"encoder.layer.0.output.dense": (8, 8)})
    task = {"task": "feature-extraction"} if kind == "transformers" else {}
    spec = Project(tmp_path).spec(
        base={"kind": kind, "path": "base"} | task, adapters=[{"name": "sql", "path": "sql"}]
    )
    start = time.process_time()
    with pytest.raises(BaseModelError, match="num_hidden_layers is 100000"):
        make_plan(read_spec(spec), tmp_path)
    assert time.process_time() - start < 10


def test_sound_numbers_that_multiply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_SMALL))
    read_skeleton(tmp_path, "feature-extraction", "float32")
    monkeypatch.setattr(limits, "_MAX_MODULES", 30)
    with pytest.raises(BaseModelError, match="makes a model of more than 30 modules, as none has"):
        read_skeleton(tmp_path, "feature-extraction", "float32")
