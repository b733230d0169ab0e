"""Tiny random bases and adapters, and one helper that drives whole builds."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HIDDEN = 32


def write_base(folder: Path, tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """A Hugging Face directory with one safetensors file of two blocks' projections."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    if tensors is None:
        sizes = {"q": 32, "k": 16, "v": 16, "up": 48}
        made: dict[str, np.ndarray] = {}
        for block in range(2):
            for name, out in sizes.items():
                weight = generator.standard_normal((out, HIDDEN)) / np.sqrt(HIDDEN)
                made[f"blocks.{block}.{name}.weight"] = weight.astype(np.float32)
                if name != "up":
                    made[f"blocks.{block}.{name}.bias"] = generator.standard_normal(out).astype(
                        np.float32
                    )
        made["words.weight"] = generator.standard_normal((40, HIDDEN)).astype(np.float32)
        tensors = made
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_adapter(
    folder: Path,
    sites: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    embeddings: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """A PEFT directory with random A and B.

    Args:
        sites: module -> (in, out).
        config: fields that replace or extend the config.
        tensors: tensors that replace or extend the file; None removes one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    rank_of = dict((config or {}).get("rank_pattern", {}))
    made: dict[str, np.ndarray] = {}
    for site, (size_in, size_out) in sites.items():
        r = next((value for key, value in rank_of.items() if site.endswith(key)), rank)
        a = generator.standard_normal((r, size_in)).astype(np.float32) / np.sqrt(size_in)
        b = generator.standard_normal((size_out, r)).astype(np.float32) * 0.3
        prefix = f"base_model.model.{site}.lora_"
        names = ("embedding_A", "embedding_B") if site in embeddings else ("A.weight", "B.weight")
        made[prefix + names[0]] = a.astype(np.float32)
        made[prefix + names[1]] = b.astype(np.float32)
    for name, tensor in (tensors or {}).items():
        if tensor is None:
            del made[name]
        else:
            made[name] = tensor
    save_file(made, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({site.rsplit(".", 1)[-1] for site in sites}),
        "bias": "none",
        "init_lora_weights": True,
    }
    fields.update(config or {})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


class Project:
    """A folder with a base, adapters and specs, as a user would have it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def spec(self, name: str = "spec.yaml", **changes: Any) -> Path:
        """Write a spec: a fused qkv layer and a plain one, two adapters; `changes` replace keys."""
        data: dict[str, Any] = {
            "version": 1,
            "name": "tiny",
            "base": {
                "kind": "layers",
                "path": "base",
                "layers": [
                    {
                        "name": "qkv",
                        "type": "linear",
                        "slices": [
                            {"name": part, "site": f"blocks.0.{part}"} for part in ("q", "k", "v")
                        ],
                    },
                    {"name": "up", "type": "linear", "site": "blocks.0.up"},
                ],
            },
            "adapters": [
                {"name": "sql", "path": "sql"},
                {"name": "chat", "path": "chat", "scale": 0.5},
            ],
        }
        data.update(changes)
        path = self.folder / name
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Base, and two adapters of different rank on different sites, one with rsLoRA."""
    write_base(tmp_path / "base")
    write_adapter(
        tmp_path / "sql",
        {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)},
        rank=4,
        seed=1,
    )
    write_adapter(
        tmp_path / "chat",
        {"blocks.0.q": (32, 32), "blocks.0.k": (32, 16)},
        rank=8,
        seed=2,
        config={"use_rslora": True},
    )
    return Project(tmp_path)


def write_tenants(folder: Path, **changes: Any) -> Path:
    """A project of a fused layer, a plain one and an embedding; the spec's path.

    Adapters: `sql` (q, v, up; rank 4), `chat` (q, k; rank 8, rsLoRA, scale 0.5) and `spare` (up and
    the embedding; rank 2), which the artifact carries but does not load: there are two slots.
    """
    write_base(folder / "base")
    write_adapter(
        folder / "sql",
        {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)},
        rank=4,
        seed=1,
    )
    write_adapter(
        folder / "chat",
        {"blocks.0.q": (32, 32), "blocks.0.k": (32, 16)},
        rank=8,
        seed=2,
        config={"use_rslora": True},
    )
    write_adapter(
        folder / "spare",
        {"blocks.0.up": (32, 48), "words": (40, 32)},
        rank=2,
        alpha=3,
        seed=3,
        embeddings=("words",),
    )
    layers = [
        {
            "name": "qkv",
            "type": "linear",
            "slices": [{"name": part, "site": f"blocks.0.{part}"} for part in ("q", "k", "v")],
        },
        {"name": "up", "type": "linear", "site": "blocks.0.up"},
        {"name": "words", "type": "embedding", "site": "words"},
    ]
    data: dict[str, Any] = {
        "base": {"kind": "layers", "path": "base", "layers": layers},
        "adapters": [
            {"name": "sql", "path": "sql"},
            {"name": "chat", "path": "chat", "scale": 0.5},
            {"name": "spare", "path": "spare"},
        ],
        "slots": 2,
        "export": {"formats": ["onnx"], "strategy": "masked"},
    }
    return Project(folder).spec(**(data | changes))


@pytest.fixture(scope="session")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of `write_tenants`, built once. Copy it before you change a file of it."""
    import torch

    from loraexport.pipeline.build import build

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tenants")
    return build(write_tenants(folder), folder / "artifacts")[0]


def write_bert(folder: Path) -> Path:
    """A tiny BERT with random weights, as save_pretrained writes it."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def write_model_project(folder: Path, **changes: Any) -> Path:
    """A tiny BERT, two adapters on different sites, and a spec of the whole model."""
    write_bert(folder / "bert")
    attention = "encoder.layer.{}.attention.self"
    sites = {
        "sql": {f"{attention.format(0)}.query": (32, 32), f"{attention.format(1)}.value": (32, 32)},
        "chat": {
            f"{attention.format(1)}.query": (32, 32),
            "encoder.layer.0.output.dense": (48, 32),
        },
        "legal": {f"{attention.format(1)}.value": (32, 32)},
    }
    for seed, (name, own) in enumerate(sites.items()):
        config = {"use_rslora": name == "chat", "target_modules": list(own)}
        write_adapter(folder / name, own, rank=2 << seed, seed=seed, config=config)
    base = {"kind": "transformers", "path": "bert", "task": "feature-extraction"}
    return Project(folder).spec(**({"base": base, "slots": 3, "max_rank": 8} | changes))


def write_vit_project(folder: Path, **changes: Any) -> Path:
    """A tiny ViT of images [3, 8, 12], its image processor, an adapter, and a spec."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=[8, 12],
        patch_size=4,
        initializer_range=0.2,
    )
    ViTModel(config).save_pretrained(folder / "vit")
    (folder / "vit/preprocessor_config.json").write_text("{}")
    sites = {"layers.0.attention.q_proj": (32, 32), "layers.1.mlp.fc2": (48, 32)}
    write_adapter(folder / "birds", sites, config={"target_modules": list(sites)})
    base = {"kind": "transformers", "path": "vit", "task": "feature-extraction"}
    adapters = [{"name": "birds", "path": "birds"}]
    return Project(folder).spec(**({"base": base, "adapters": adapters} | changes))
