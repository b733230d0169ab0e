"""Folders with a base, adapters and a spec, as a user would have them."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from support.adapters import write_adapter
from support.models import write_base, write_bert


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


def write_small(folder: Path, **changes: Any) -> Path:
    """A project of one layer and one adapter, named `tiny`; the spec's path."""
    write_base(folder / "base")
    write_adapter(folder / "sql", {"blocks.0.up": (32, 48)}, rank=2)
    layers = [{"name": "up", "type": "linear", "site": "blocks.0.up"}]
    data: dict[str, Any] = {
        "base": {"kind": "layers", "path": "base", "layers": layers},
        "adapters": [{"name": "sql", "path": "sql"}],
        "export": {"strategy": "masked"},
    }
    return Project(folder).spec(**(data | changes))


def write_one_layer(folder: Path, **changes: Any) -> Path:
    """One layer, one adapter, TorchScript only: the cheapest build there is."""
    weights = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    write_base(folder / "base", {"q.weight": weights})
    write_adapter(folder / "sql", {"q": (8, 6)}, rank=2)
    base = {"kind": "layers", "path": "base"}
    base["layers"] = [{"name": "q", "type": "linear", "site": "q"}]  # type: ignore[assignment]
    data = {
        "base": base,
        "adapters": [{"name": "sql", "path": "sql"}],
        "export": {"formats": ["torchscript"]},
    }
    return Project(folder).spec(**(data | changes))


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


def write_graph(folder: Path) -> None:
    """A graph of a table and a product, whose weights lie in a file beside; an adapter, a spec."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    weights = {"table": generator.standard_normal((40, 32)), "q.weight": np.eye(32)}
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 32])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], "/words/Gather"),
        helper.make_node("MatMul", ["x", "q.weight"], ["y"], "/q/MatMul"),
    ]
    values = [
        numpy_helper.from_array(weight.astype(np.float32), name) for name, weight in weights.items()
    ]
    graph = helper.make_graph(nodes, "tiny", [ids], [y], values)
    (folder / "graph").mkdir()
    opset = [helper.make_opsetid("", 21)]
    onnx.save(
        helper.make_model(graph, opset_imports=opset, ir_version=10),
        folder / "graph/model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    (folder / "graph/config.json").write_text('{"vocab_size": 40, "pad_token_id": 0}')
    write_adapter(folder / "sql", {"q": (32, 32)}, rank=2)
    base = {"kind": "onnx", "path": "graph"}
    Project(folder).spec(base=base, adapters=[{"name": "sql", "path": "sql"}])
