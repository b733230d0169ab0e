"""The files beside a decoder's graph: genai_config.json, tokenizers, special tokens, templates."""

import json
import random
from pathlib import Path

import numpy as np
from support.builds import write_graph, write_model_project
from support.decoders import FAMILIES, write_decoder, write_genai, write_tokenizer
from support.manifests import list_again

import loraexport
from loraexport.bases.decoder import load_decoder_graph
from loraexport.bases.decoder_text import write_text
from loraexport.bases.genai_folder import FOLDER, adapt_config, describe, make_tokenizer
from loraexport.pipeline.build import build
from loraexport.plan.decoder import DecoderPlan
from loraexport.plan.plan import Plan
from loraexport_runtime.contract.genai_config import GENAI_CONFIG
from loraexport_runtime.generation.load import load_generator

from .mutate import mutate
from .target import ChangedNumbersError, Target

TEXT_FILES = (
    GENAI_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PROMPTS = ([5, 7, 6], [9, 8], [4])
ADAPTERS = ("first", "second", None)
CHAT = [{"role": "user", "content": "hello world"}]
_STEPS = 6


def write_text_files(folder: Path) -> None:
    """A tokenizer with every file that may be beside it, small: a mutation finds each part."""
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    tokens = ["<pad>", "<s>", "</s>", *sorted(set("<user>hello world<assistant>")), "Ġ"]
    vocabulary = {token: index for index, token in enumerate(tokens) if token != " "}
    data["model"] |= {"vocab": vocabulary, "merges": []}
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    file.write_text(json.dumps(data), encoding="utf-8")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2}))


class Texts(Target):
    """These files of a base, to its plan and to what a build makes of them."""

    def prepare(self) -> None:
        projects = self.home / "originals"
        write_decoder(projects / "decoder", FAMILIES["Llama"])
        write_genai(projects / "genai")
        write_model_project(projects / "model")
        (projects / "graph").mkdir()
        write_graph(projects / "graph")
        places = {"decoder": "base", "genai": "genai", "model": "bert", "graph": "graph"}
        self.originals = [(projects / name, place) for name, place in places.items()]
        for project, place in self.originals:
            write_text_files(project / place)

    def attack(self, draw: random.Random) -> str:
        project, place = draw.choice(self.originals)
        folder = self.fresh(project)
        self.said = mutate(folder / place, draw, TEXT_FILES)
        plan = loraexport.make_plan(folder / "spec.yaml")
        if isinstance(plan.kind, DecoderPlan):
            _adapt(plan, plan.kind, folder / "out")
        return self.said


def _adapt(plan: Plan, decoder: DecoderPlan, out: Path) -> None:
    """What a build does with a decoder's folder, short of its graph."""
    (out / FOLDER).mkdir(parents=True)
    make_tokenizer(decoder.directory, out / FOLDER)
    if decoder.graph is not None:
        base = load_decoder_graph(plan)
        base.write_files(out / FOLDER)
        adapt_config(out / FOLDER)
        write_text(decoder.directory, out / FOLDER)
        describe(out / FOLDER, base.positions, plan.spec.export.blend)


class Generators(Target):
    """These files of a decoder's artifact, opened and run; most are listed as they have become."""

    def prepare(self) -> None:
        spec = write_decoder(self.home / "project", FAMILIES["Llama"])
        self.artifact, _ = build(spec, self.home / "out")
        write_text_files(self.artifact / FOLDER)
        list_again(self.artifact, FOLDER)
        self.before = self._run(self.artifact)

    def attack(self, draw: random.Random) -> str:
        folder = self.fresh(self.artifact)
        self.said = mutate(folder / FOLDER, draw, TEXT_FILES)
        if draw.random() < 0.8:
            self.said = f"listed, {self.said}"
            list_again(folder, FOLDER)
        tokens = self._run(folder)
        # What ends a text, and how tokens are drawn, is the config's to say.
        if GENAI_CONFIG not in self.said and not np.array_equal(tokens, self.before):
            raise ChangedNumbersError("an artifact that opens gives other tokens")
        return self.said

    def _run(self, folder: Path) -> np.ndarray:
        with load_generator(folder) as generator:
            tokens = generator.greedy(PROMPTS, ADAPTERS, _STEPS)
            generator.generate([CHAT, "hello"], adapters=["first", None], max_new_tokens=2)
            return tokens
