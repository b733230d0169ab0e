"""Three tenants' retrieval in one batch, and PEFT's scores of each alone.

    python examples/tenants.py artifacts/minilm

Every batch mixes rows of the three adapters of specs/adapters. Their texts are the held-out parts
that specs/make/train_minilm.py scores; `--limit N` takes the first N pairs of each. Texts are
sorted by length, as a service would; `--shuffle` leaves them mixed, which pads more.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer

from loraexport_runtime import ModelSession, load

SPECS = Path(__file__).resolve().parent.parent / "specs"
ADAPTERS = SPECS / "adapters"
sys.path.insert(0, str(SPECS / "make"))
import train_minilm as train  # noqa: E402

BATCH = 48


class Vectors:
    """What the mixed batches gave, text by text: an encoder for train.score."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self._vectors = vectors

    def __call__(self, texts: list[str], max_tokens: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._vectors[text] for text in texts]))


def encode_mixed(
    session: ModelSession, tokenizer: Tokenizer, rows: list[tuple[str, str, int]], shuffle: bool
) -> dict[str, dict[str, np.ndarray]]:
    """adapter -> text -> vector, for rows of (adapter, text, longest number of tokens)."""
    encoded = []
    for adapter, text, max_tokens in rows:
        tokenizer.enable_truncation(max_tokens)
        encoded.append((adapter, text, tokenizer.encode(text).ids))
    if shuffle:
        random.Random(0).shuffle(encoded)
    else:
        encoded.sort(key=lambda row: len(row[2]))
    encodings: dict[str, dict[str, np.ndarray]] = {adapter: {} for adapter, _, _ in rows}
    mixed, seconds, real, every = 0, 0.0, 0, 0
    for start in range(0, len(encoded), BATCH):
        batch = encoded[start : start + BATCH]
        longest = max(len(ids) for _, _, ids in batch)
        input_ids = np.zeros((len(batch), longest), np.int64)
        mask = np.zeros_like(input_ids)
        for row, (_, _, ids) in enumerate(batch):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        inputs["token_type_ids"] = np.zeros_like(input_ids)
        adapters = [adapter for adapter, _, _ in batch]
        start_time = time.perf_counter()
        vectors = session.run(inputs, adapters)["sentence_embedding"]
        seconds += time.perf_counter() - start_time
        real, every = real + int(mask.sum()), every + mask.size
        mixed += len(set(adapters)) > 1
        for (adapter, text, _), vector in zip(batch, vectors, strict=True):
            encodings[adapter][text] = vector
    print(
        f"{len(encoded)} texts in batches of {BATCH}, {mixed} of them with several adapters;"
        f" {real / every:.0%} of their tokens no padding; {seconds:.1f} s"
    )
    return encodings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--limit", type=int, default=None, help="pairs of each task")
    parser.add_argument("--shuffle", action="store_true", help="do not sort texts by length")
    args = parser.parse_args()
    session = load(args.artifact)
    if not isinstance(session, ModelSession):
        raise SystemExit(f"{args.artifact} holds layers; build specs/minilm.yaml")
    tokenizer = Tokenizer.from_file(str(args.artifact / "tokenizer/tokenizer.json"))
    tokenizer.no_padding()

    tests = {name: train.split(task)[1][: args.limit] for name, task in train.TASKS.items()}
    rows = sorted(
        {
            (name, text, train.TASKS[name].max_tokens)
            for name, pairs in tests.items()
            for pair in pairs
            for text in (pair.query, pair.target)
        }
    )
    vectors = encode_mixed(session, tokenizer, rows, args.shuffle)
    print("tenant    mixed batch, onnxruntime        PEFT, alone")
    for name, pairs in tests.items():
        mixed = train.score(Vectors(vectors[name]), train.TASKS[name], pairs)
        encoder = train.load_base()
        model = PeftModel.from_pretrained(encoder.model, ADAPTERS / name).eval()
        alone = train.score(train.Encoder(model, encoder.tokenizer), train.TASKS[name], pairs)
        print(f"{name:8}  {mixed}  {alone}")


if __name__ == "__main__":
    main()
