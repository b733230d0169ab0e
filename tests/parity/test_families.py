"""Whole builds of tiny random models of every family in the docs, and refusals of others.

A family counts by two proofs: the build's own parity, and a comparison here with PEFT's adapters
one by one, on the plain model, without the position_ids that the exporter gives.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from support.families import (
    CAUSAL,
    DECODER,
    DECODER_SITES,
    FAMILIES,
    FEATURES,
    IMAGE_CLASSES,
    LONGROPE,
    ROBERTA,
    SENTENCES,
    TEXT_EMBEDDING,
    VOCABULARY,
    WINDOW,
    Family,
    load_base,
    write_model,
    write_spec,
)
from support.sentences import NORMALIZE, Module, declare, dense, follow, pool, pooling

import loraexport_runtime
from loraexport.errors import BaseModelError, ExportError, LoraexportError, exit_code
from loraexport.hf.quiet import quiet_models
from loraexport.pipeline.build import build
from loraexport_runtime.checking.model import load_reference
from loraexport_runtime.device.dtypes import NUMPY_DTYPES
from loraexport_runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
IMPLEMENTATIONS = ("eager", "peft", "torchscript-cpu", "onnx-cpu", "onnx-cpu-plain")
_FAST = (
    ("BERT", "sequence-classification"),
    ("ViT", IMAGE_CLASSES),
)
"""A text encoder and images; a decoder and Conv1D are built by others here."""
_SLOW = [pytest.mark.slow]
_PACKED: dict[str, Any] = {"packed": True, "tune": {"device": "cpu"}}


def _builds() -> list[Any]:
    """(family, task) of every build but those of sentence-embedding, which have their own test."""
    return [
        pytest.param(
            name,
            task,
            id=f"{name}-{task}",
            marks=[] if (name, task) in _FAST else _SLOW,
        )
        for name, family in FAMILIES.items()
        for task in family.tasks
        if task != SENTENCES
    ]


@pytest.mark.parametrize(("name", "task"), _builds())
def test_a_family_is_proven(name: str, task: str, tmp_path: Path) -> None:
    _prove(FAMILIES[name], task, tmp_path)


_IDENTITY = "torch.nn.modules.linear.Identity"
_NO_BIAS = dense(32, 24, _IDENTITY, bias=False)
_PAIR = (dense(32, 48, _IDENTITY, bias=False), dense(48, 32, _IDENTITY, bias=False))


@pytest.mark.parametrize(
    ("name", "mode", "steps", "packed"),
    [
        pytest.param("BERT", "mean", (NORMALIZE,), False, marks=_SLOW),
        pytest.param("BERT", "cls", (), False, marks=_SLOW),
        pytest.param("BERT", "max", (), False, marks=_SLOW),
        pytest.param("BERT", "mean", (NORMALIZE,), True, marks=_SLOW),
        ("BERT", ("cls", "max"), (), True),
        # Qwen3-Embedding's and E5-Mistral's form; the former's as saved is in tests/hf.
        pytest.param("Qwen3", "lasttoken", (NORMALIZE,), False, marks=_SLOW),
        pytest.param("Mistral", "lasttoken", (NORMALIZE,), False, marks=_SLOW),
        pytest.param("Qwen2", "weightedmean", (), False, marks=_SLOW),
        # EmbeddingGemma's, as published.
        pytest.param("EmbeddingGemma", "mean", (*_PAIR, NORMALIZE), False, marks=_SLOW),
        # sentence-t5's.
        pytest.param("T5 (encoder)", "mean", (_NO_BIAS, NORMALIZE), False, marks=_SLOW),
    ],
)
def test_sentence_embedding_pools_as_declared(
    name: str, mode: Any, steps: tuple[Module, ...], packed: bool, tmp_path: Path
) -> None:
    family, task = FAMILIES[name], SENTENCES
    write_model(family, task, tmp_path)
    modes = [mode] if isinstance(mode, str) else mode
    declare(tmp_path / "base", pooling(32, mode), *steps)

    def vectors(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
        texts = [states[keep == 1] for states, keep in zip(hidden, mask, strict=True)]
        pooled = [np.concatenate([pool(text, one) for one in modes]) for text in texts]
        return np.stack([follow(vector, steps, lambda x: x) for vector in pooled])

    artifact = _build(task, tmp_path, **(_PACKED if packed else {}))
    _check(family, task, tmp_path, artifact, vectors)


@pytest.mark.slow  # what one is without its padding has tests/bases/test_unpadded
@pytest.mark.parametrize(
    ("name", "task"),
    [("RoBERTa", FEATURES), ("BERT", FEATURES), ("BERT", "token-classification")],
)
def test_a_family_without_its_padding(name: str, task: str, tmp_path: Path) -> None:
    _prove(FAMILIES[name], task, tmp_path, **_PACKED)


@pytest.mark.slow
def test_xlm_roberta_without_its_padding(tmp_path: Path) -> None:
    family = replace(FAMILIES["RoBERTa"], config=lambda: tf.XLMRobertaConfig(**ROBERTA))
    _prove(family, FEATURES, tmp_path, **_PACKED)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("Llama", True),
        pytest.param("Llama", False, marks=_SLOW),
        pytest.param("GPT-2", True, marks=_SLOW),
    ],
)
def test_lm_head_is_a_site_and_a_tied_embedding_stays(
    name: str, tied: bool, tmp_path: Path
) -> None:
    family = FAMILIES[name]

    def config() -> Any:
        made = family.config()
        made.tie_word_embeddings = tied
        return made

    first, second = family.sites
    changed = replace(family, config=config, sites=([*first, "lm_head"], second))
    _prove(changed, CAUSAL, tmp_path)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    same = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert same == tied, "the model is not what the case says"


@pytest.mark.slow
def test_longrope_holds_past_its_first_length(tmp_path: Path) -> None:
    family = FAMILIES["Phi-3"]
    changed = replace(
        family,
        config=lambda: tf.Phi3Config(
            **DECODER, original_max_position_embeddings=8, rope_parameters=dict(LONGROPE)
        ),
        window=8,
    )
    _prove(changed, FEATURES, tmp_path)


def test_a_clip_vision_tower_of_its_own(tmp_path: Path) -> None:
    family = FAMILIES["CLIP (vision)"]
    changed = replace(family, config=lambda: family.config().vision_config)
    _prove(changed, FEATURES, tmp_path)


def test_the_docs_list_these_families() -> None:
    text = (ROOT / "docs/reference/families.md").read_text(encoding="utf-8")
    table = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    rows = ["| family | tasks | notes |", "| --- | --- | --- |"]
    rows += [
        f"| {name} | {', '.join(family.tasks)} | {family.notes} |"
        for name, family in FAMILIES.items()
    ]
    assert table == rows, "write this into docs/reference/families.md:\n" + "\n".join(rows)


@pytest.mark.parametrize(
    ("config", "sites", "format", "error", "message"),
    [
        pytest.param(
            lambda: tf.LlamaConfig(
                **DECODER, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}
            ),
            DECODER_SITES,
            "torchscript",
            BaseModelError,
            "a model of type 'llama' with rope_type 'dynamic' computes its frequencies anew",
            id="dynamic-rope",
        ),
        pytest.param(
            lambda: tf.MixtralConfig(**DECODER, num_local_experts=4),
            (["q_proj"], ["o_proj"]),
            "onnx",
            ExportError,
            "(a model of type 'mixtral'): torch.onnx.export failed: DispatchError: No ONNX function"
            " found for",
            id="Mixtral-operator",
            marks=_SLOW,
        ),
        pytest.param(
            lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
            (["query_key_value"], ["dense"]),
            "torchscript",
            ExportError,
            "(a model of type 'bloom'): torch.jit.trace failed: Could not export Python function"
            " call 'GeLUFunction'",
            id="Bloom-function",
        ),
        pytest.param(
            lambda: tf.Gemma2Config(**DECODER, head_dim=8, sliding_window=WINDOW),
            DECODER_SITES,
            "torchscript",
            BaseModelError,
            "a model of type 'gemma2' gives NaN or Inf for padded texts, in float64",
            id="Gemma-2-reference",
        ),
    ],
)
def test_a_family_that_fails_says_what_failed(
    config: Callable[[], Any],
    sites: tuple[list[str], list[str]],
    format: str,
    error: type[LoraexportError],
    message: str,
    tmp_path: Path,
) -> None:
    write_model(Family(config, sites), FEATURES, tmp_path)
    with pytest.raises(error) as caught:
        _build(FEATURES, tmp_path, format)
    assert message in str(caught.value)
    assert exit_code(caught.value) == (4 if error is BaseModelError else 1)
    kept = [path.name for path in (tmp_path / "out").glob("*") if not path.name.startswith(".")]
    assert kept == [], "a failed build leaves nothing"


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
def test_a_build_prints_its_stages_and_results_alone(tmp_path: Path) -> None:
    family = FAMILIES["GPT-2"]
    first, second = family.sites
    write_model(replace(family, sites=([*first, "lm_head"], second)), CAUSAL, tmp_path)
    write_spec(CAUSAL, tmp_path)
    command = [sys.executable, "-m", "loraexport", "build", "spec.yaml", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = ("building spec.yaml: ", "published out/tiny: parity passed", "digest, to pin it: ")
    wanted += ("note: it has no tokenizer/tokenizer.json",)
    noise = [
        line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(wanted)
    ]
    assert noise == []


def _prove(family: Family, task: str, folder: Path, **export: Any) -> None:
    """Write the model, build it, and hold the artifact to PEFT."""
    write_model(family, task, folder)
    _check(family, task, folder, _build(task, folder, **export))


def _build(task: str, folder: Path, *formats: str, **export: Any) -> Path:
    torch.set_num_threads(1)
    write_spec(task, folder, *formats, **export)
    artifact, report = build(folder / "spec.yaml", folder / "out")
    assert report.status == "passed"
    assert set(report.summary().checked) >= set(IMPLEMENTATIONS)
    assert report.silent_adapters == ()
    return artifact


def _check(
    family: Family,
    task: str,
    folder: Path,
    artifact: Path,
    pool: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> None:
    """Parity saw batches, both paddings and the window; and the runtime gives what PEFT gives."""
    session: Any = loraexport_runtime.load(artifact)
    cases = load_reference(artifact, session.manifest, session.model).inputs.values()
    main = session.model.inputs[0]
    if "sequence" not in main.shape:
        # The example of the export has three rows.
        assert {1, 2, 4} == {len(inputs[main.name]) for inputs in cases}
    else:
        masks = [inputs["attention_mask"] for inputs in cases]
        batches = [mask for mask in masks if len(mask) >= 2]
        lefts = [(mask[:, 0] == 0).any() for mask in batches]
        assert any(lefts) == (main.name == "input_ids"), "texts are padded on the left, sounds not"
        assert any((mask[:, -1] == 0).any() for mask in batches), "no padding on the right"
        assert max(mask.sum(1).max() for mask in masks) > family.window

    _check_refusals(session)
    with quiet_models():
        model = PeftModel.from_pretrained(load_base(task, folder), folder / "first", "first")
        model.load_adapter(folder / "second", "second")
    adapters = ["second", None, "first", "second"]
    for left in (False, True) if main.name == "input_ids" else (False,):
        inputs = _inputs(session, model, left)
        found = session.run(inputs, adapters)[session.model.outputs[0].name]
        for row, adapter in enumerate(adapters):
            expected = _run_peft(model.eval(), task, inputs, adapter)
            keep: Any = ...
            if "attention_mask" in inputs:
                mask = inputs["attention_mask"]
                if pool is not None:
                    expected = pool(expected, mask)
                keep = _kept(model, mask[row], found.shape[1]) if found.ndim == 3 else ...
            assert found.shape == expected.shape
            scale = np.abs(expected[row][keep]).max()
            error = np.abs(found[row][keep] - expected[row][keep]).max() / scale
            assert error < 1e-4, f"row {row}, adapter {adapter}, left {left}: {error}"


def _check_refusals(session: Any) -> None:
    """What a session says to sounds that are too short, and to boxes that lie outside."""
    inputs = {
        entry.name: np.zeros(entry.sizes(1, 50), NUMPY_DTYPES[entry.dtype])
        for entry in session.model.inputs
    }
    if "input_values" in inputs:
        short = {name: array[:, :17] for name, array in inputs.items()}
        with pytest.raises(InputError, match=r"has 17 samples a row, .* expected 18 at least"):
            session.run(short)
    if "bbox" in inputs:
        for box in ([0, 0, 40, 1], [-1, 0, 1, 1], [2, 0, 1, 1]):
            boxes = {**inputs, "bbox": np.zeros((1, 50, 4), np.int64)}
            boxes["bbox"][0, 3] = box
            with pytest.raises(InputError, match=r"bbox\[0, 3\] is \[.* all of them 0 to 39"):
                session.run(boxes)


def _inputs(session: Any, model: Any, left: bool) -> dict[str, np.ndarray]:
    """Four rows, of texts and sounds three that are padded."""
    entries = {entry.name: entry for entry in session.model.inputs}
    samples = 50 if "input_values" in entries else 1
    lengths = [5 * samples, 12 * samples + 7, 17 * samples, 9 * samples]
    generator = np.random.default_rng(7)
    mask = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in enumerate(lengths):
        mask[row, mask.shape[1] - length if left else 0 :][:length] = 1
    shown = generator.integers(3, VOCABULARY, mask.shape)
    if session.model.task == TEXT_EMBEDDING:  # CLIP's is the state of the token that ends a text
        last = [row.nonzero()[0].max() for row in mask]
        shown[np.arange(len(mask)), last] = model.config.eos_token_id
    corners = np.sort(generator.integers(0, 40, (2, *mask.shape, 2)), axis=0)
    values = {
        "input_ids": np.where(mask, shown, getattr(model.config, "pad_token_id", 0) or 0),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
        "bbox": np.concatenate(corners, axis=-1) * mask[..., None],
    }
    for name in entries.keys() - values.keys():
        numbers = generator.standard_normal(entries[name].sizes(*mask.shape))
        numbers = numbers * mask if name == "input_values" else numbers
        values[name] = numbers.astype(np.float32)
    return {name: values[name] for name in entries}


def _kept(model: Any, mask: np.ndarray, count: int) -> np.ndarray:
    """Which of a row's outputs follow from no padding."""
    if count < len(mask):  # a sound's: the steps that its own samples give
        steps = model._get_feat_extract_output_lengths(torch.tensor(mask.sum()))
        return np.arange(count) < int(steps)
    return np.concatenate([mask == 1, np.ones(count - len(mask), bool)])


def _run_peft(
    model: Any, task: str, inputs: dict[str, np.ndarray], adapter: str | None
) -> np.ndarray:
    """The whole batch with one adapter, or with none."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        if adapter is None:
            with model.disable_adapter():
                found = model(**tensors, return_dict=True)
        else:
            model.set_adapter(adapter)
            found = model(**tensors, return_dict=True)
    vectors = ("image_embeds", "text_embeds", "audio_embeds", "pooler_output")
    names = vectors if task.endswith("-embedding") and task != SENTENCES else ()
    names = (*names, "logits", "last_hidden_state")
    y: torch.Tensor = next(found[name] for name in names if name in found)
    return y.numpy()
