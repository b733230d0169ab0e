"""Whole builds of tiny random models of every family in the docs, and refusals of others.

A family counts by two proofs: the build's own parity, and a comparison here with PEFT's adapters
one by one, on the plain model, without the position_ids that the exporter gives.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
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
    IMAGE_EMBEDDING,
    LONGROPE,
    ROBERTA,
    VOCABULARY,
    WINDOW,
    Family,
    load_base,
    write_model,
    write_spec,
)

import loraexport_runtime
from loraexport.errors import BaseModelError, ExportError, LoraexportError, exit_code
from loraexport.hf.quiet import quiet_models
from loraexport.pipeline.build import build
from loraexport_runtime.checking.model import load_reference

ROOT = Path(__file__).resolve().parents[2]
IMPLEMENTATIONS = ("eager", "peft", "torchscript-cpu", "onnx-cpu", "onnx-cpu-plain")
_FAST = (
    ("BERT", FEATURES),
    ("BERT", "sequence-classification"),
    ("BERT", "token-classification"),
    ("Llama", FEATURES),
    ("GPT-2", CAUSAL),
    ("ViT", IMAGE_CLASSES),
    ("CLIP (vision)", IMAGE_EMBEDDING),
)
"""One build of every task, and of a text encoder, a decoder, Conv1D and images."""
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
        if task != "sentence-embedding"
    ]


@pytest.mark.parametrize(("name", "task"), _builds())
def test_a_family_is_proven(name: str, task: str, tmp_path: Path) -> None:
    _prove(FAMILIES[name], task, tmp_path)


@pytest.mark.parametrize(
    ("mode", "normalise", "packed"),
    [
        ("mean_tokens", True, False),
        ("cls_token", False, False),
        ("max_tokens", False, False),
        ("mean_tokens", True, True),
        ("max_tokens", False, True),
    ],
)
def test_sentence_embedding_pools_as_declared(
    mode: str, normalise: bool, packed: bool, tmp_path: Path
) -> None:
    family, task = FAMILIES["BERT"], "sentence-embedding"
    write_model(family, task, tmp_path)
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    listed = [
        {"idx": index, "name": str(index), "path": name, "type": f"sentence_transformers.{name}"}
        for index, name in enumerate(modules)
    ]
    (tmp_path / "base/modules.json").write_text(json.dumps(listed))
    (tmp_path / "base/Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, f"pooling_mode_{mode}": True}
    (tmp_path / "base/Pooling/config.json").write_text(json.dumps(pooling))

    def pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
        texts = [one[keep == 1] for one, keep in zip(hidden, mask, strict=True)]
        if mode == "mean_tokens":
            pooled = np.stack([text.mean(0) for text in texts])
        elif mode == "max_tokens":
            pooled = np.stack([text.max(0) for text in texts])
        else:
            pooled = hidden[:, 0]
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True) if normalise else pooled

    artifact = _build(task, tmp_path, **(_PACKED if packed else {}))
    _check(family, task, tmp_path, artifact, pool)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param("RoBERTa", FEATURES, marks=_SLOW),
        ("BERT", FEATURES),
        pytest.param("BERT", "token-classification", marks=_SLOW),
    ],
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
    table = [line for line in text.splitlines() if line.startswith("|")]
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
            lambda: tf.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            ),
            (["q_proj"], ["fc2"]),
            "onnx",
            BaseModelError,
            "(a model of type 'opt') does not run with multi-LoRA sites: site"
            " 'decoder.layers.0.fc2' gets a tensor of shape [21, 48], where a batch of rows has to"
            " come first",
            id="OPT-flattens-its-rows",
        ),
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
    images = session.model.inputs[0].name == "pixel_values"
    if images:
        # The example of the export has three rows.
        assert {1, 2, 4} == {len(inputs["pixel_values"]) for inputs in cases}
    else:
        masks = [inputs["attention_mask"] for inputs in cases]
        batches = [mask for mask in masks if len(mask) >= 2]
        assert any((mask[:, 0] == 0).any() for mask in batches), "no padding on the left"
        assert any((mask[:, -1] == 0).any() for mask in batches), "no padding on the right"
        assert max(mask.sum(1).max() for mask in masks) > family.window

    with quiet_models():
        model = PeftModel.from_pretrained(load_base(task, folder), folder / "first", "first")
        model.load_adapter(folder / "second", "second")
    adapters = ["second", None, "first", "second"]
    for left in (False,) if images else (False, True):
        inputs = _images(session) if images else _inputs(model, [5, 12, 17, 9], left)
        found = session.run(_accepted(session, inputs), adapters)[session.model.outputs[0].name]
        for row, adapter in enumerate(adapters):
            expected = _run_peft(model.eval(), inputs, adapter)
            keep: Any = ...
            if not images:
                mask = inputs["attention_mask"]
                if pool is not None:
                    expected = pool(expected, mask)
                keep = mask[row] == 1 if found.ndim == 3 else ...
            assert found.shape == expected.shape
            scale = np.abs(expected[row][keep]).max()
            error = np.abs(found[row][keep] - expected[row][keep]).max() / scale
            assert error < 1e-4, f"row {row}, adapter {adapter}, left {left}: {error}"


def _inputs(model: Any, lengths: Sequence[int], left: bool) -> dict[str, np.ndarray]:
    pad = model.config.pad_token_id or 0
    generator = np.random.default_rng(7)
    ids = np.full((len(lengths), max(lengths)), pad)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(ids.shape[1] - length, None) if left else slice(length)
        ids[row, part] = generator.integers(3, VOCABULARY, length)
        mask[row, part] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _images(session: Any) -> dict[str, np.ndarray]:
    sizes = [int(size) for size in session.model.inputs[0].shape[1:]]
    generator = np.random.default_rng(7)
    return {"pixel_values": generator.standard_normal((4, *sizes)).astype(np.float32)}


def _accepted(session: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With token types where the graph takes them."""
    types = {entry.name for entry in session.model.inputs} & {"token_type_ids"}
    return {**{name: np.zeros_like(inputs["input_ids"]) for name in types}, **inputs}


def _run_peft(model: Any, inputs: dict[str, np.ndarray], adapter: str | None) -> np.ndarray:
    """The whole batch with one adapter, or with none."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        if adapter is None:
            with model.disable_adapter():
                found = model(**tensors, return_dict=True)
        else:
            model.set_adapter(adapter)
            found = model(**tensors, return_dict=True)
    names = ("logits", "image_embeds", "last_hidden_state")
    y: torch.Tensor = next(found[name] for name in names if name in found)
    return y.numpy()
