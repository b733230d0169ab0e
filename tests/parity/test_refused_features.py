"""Adapters of whole models that a build refuses."""

from pathlib import Path
from typing import Any

import pytest
from support.peft_features import World, of

from loraexport.pipeline.build import build
from loraexport_runtime import (
    AdapterWeightsError,
)

# PEFT says of an embedding LoRA that it saves the embedding too; of lora_bias that it cannot be
# merged into a layer without a bias, and, wrongly, that its tensors are shards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning"),
]


@pytest.mark.parametrize(
    ("base", "keys", "changes", "message"),
    [
        pytest.param(
            "bert",
            of("bert", "plain", "head"),
            {"task": "feature-extraction"},
            "it brings 'classifier', trained whole .modules_to_save., for which there is no place"
            " here. Choose a task whose model has this layer",
            id="a head for a task without one",
        ),
        pytest.param(
            "bert",
            of("bert", "plain", "saved_norm"),
            {},
            "LayerNorm', trained whole .modules_to_save., is no linear layer; only linear layers",
            id="a LayerNorm",
        ),
        pytest.param(
            "bert",
            of("bert", "embedding", "saved_embedding"),
            {},
            "word_embeddings', trained whole .modules_to_save., which is no torch.nn.Linear; only",
            id="an embedding",
        ),
        pytest.param(
            "gpt2",
            of("gpt2", "plain", "saved_conv1d"),
            {},
            "attn.c_proj', trained whole .modules_to_save., which is no torch.nn.Linear",
            id="a Conv1D",
        ),
        pytest.param(
            "bert",
            of("bert", "head", "wide_head"),
            {"export": {"blend": True}},
            "maps 32 to 3 features, but site 'classifier' maps 32 to 5",
            id="a blend of heads of different width",
        ),
        pytest.param(
            "bert",
            of("bert", "wide_head", "dora_head"),
            {},
            "maps 32 to 3 features, but site 'classifier' maps 32 to 5",
            id="LoRA on a head beside a wider head",
        ),
        pytest.param(
            "roberta",
            of("roberta", "head", "plain"),
            {},
            "it brings no 'classifier.*', and the base has none of its own; train it with",
            id="no head for a base without one",
        ),
    ],
)
def test_a_build_refuses(
    world: World,
    tmp_path: Path,
    base: str,
    keys: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    path = world.spec("refused", base, keys, folder=tmp_path, **changes)
    with pytest.raises(AdapterWeightsError, match=message):
        build(path, tmp_path / "out")
    assert not (tmp_path / "out/refused").exists()
