"""On a CUDA device: what adapters of a decoder bring beside A and B, in steps that are captured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoder_features import write_features
from support.decoders import make_prompts

import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.generation.load import load_generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # PEFT says of lora_bias that its tensors are shards, wrongly.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning"),
]
STEPS = 12
MODULES = ["plain", "dora", "lora_bias", "lora_only", "all_three"]
ENDS = ["embedding", "saved_head", "saved_table", "saved_both", "dora_ends", "biased_head"]
BLENDS: list[Any] = [{"plain": 0.5}, {"dora": 0.75, "lora_only": 1.5}, "dora", None, {}]
Engines = list[lr.TextGenerator]


def _build(folder: Path, names: list[str], dtype: str, **changes: Any) -> tuple[Path, Any]:
    """These adapters double the logits, and with them what rounding does."""
    export = {"dtype": dtype, **changes.pop("export", {})}
    parity = {"tolerance": {"float16": 0.05, "bfloat16": 0.3}[dtype]}
    later = changes.pop("later", [])
    spec = write_features(folder, "Qwen2", names, later, export=export, parity=parity, **changes)
    return build(spec, folder / "out")


def _open(artifact: Path) -> Engines:
    """With captured steps, and with plain ones of as many rows."""
    captured = load_generator(artifact, ["cuda"], cuda_graphs=True, rows=8)
    plain = load_generator(artifact, ["cuda"], rows=8)
    runner: Any = plain.engine._worker._runner
    runner.step_rows = captured.engine._worker._runner.step_rows
    return [captured, plain]


def _tokens(engines: Engines, rows: list[Any], **options: Any) -> list[tuple[int, ...]]:
    """Of a batch, the same from both engines."""
    prompts = make_prompts(*(3 + 4 * (index % 5) for index in range(len(rows))))
    options = {"max_new_tokens": STEPS, "temperature": 0.0, **options}
    captured, plain = (one.generate(prompts, rows, **options) for one in engines)
    assert captured == plain, rows
    return [one.tokens for one in captured]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("names", "blend"), [(MODULES, False), (ENDS, False), (MODULES, True)])
def test_features_are_proven_and_captured(
    tmp_path: Path, names: list[str], blend: bool, dtype: str
) -> None:
    """Parity of the build, whose engines are on the device; and a batch of all of them."""
    artifact, report = _build(tmp_path, names, dtype, export={"blend": blend})
    assert report.status == "passed"
    found = {row.implementation for row in report.rows}
    assert found >= {"onnx-cuda", "onnx-engine-cuda", "onnx-captured-cuda"}
    assert {row.adapter for row in report.rows} >= set(names) | ({"blend"} if blend else set())
    engines = _open(artifact)
    for _ in range(2):  # the second time every step has been captured
        texts = _tokens(engines, [*names, None, names[0]])
    if blend:
        _tokens(engines, BLENDS)
    assert len(set(texts)) > len(names) // 2, "adapters move the tokens"
    for engine in engines:
        engine.close()


def test_features_come_and_go_beside_captured_steps(tmp_path: Path) -> None:
    """Loaded into slots whose steps were captured with neither, and out again."""
    later = ["dora", "saved_both", "dora_ends"]
    artifact, _ = _build(
        tmp_path,
        ["plain", "embedding"],
        "float16",
        later=later,
        slots=2,
        max_rank=4,
        sites=[f"{part}_proj" for part in ("q", "k", "v", "o", "down")]
        + ["embed_tokens", "lm_head"],
        features=["heads", "dora", "bias"],
        export={"blend": True},
    )
    engines = _open(artifact)
    before = _tokens(engines, [None, "plain", "embedding", "plain"])
    for name in later:
        for engine in engines:
            engine.load_adapter(name, tmp_path / name, base=tmp_path / "base")
        both = _tokens(engines, [name, None, {name: 0.5}, {name: 0.5, "plain": -1.0}])
        assert both[1] == _tokens(engines, [None, None])[1]
    for engine in engines:
        for name in later:
            engine.unload_adapter(name)
    assert _tokens(engines, [None, "plain", "embedding", "plain"]) == before
    for engine in engines:
        engine.close()


def test_rules_on_tokens_beside_captured_steps(tmp_path: Path) -> None:
    """What bans, penalties and chance choose is chosen alike."""
    artifact, _ = _build(tmp_path, ["plain"], "float16")
    engines = _open(artifact)
    rows = [None, "plain", "plain"]
    (likeliest, *_), free = _tokens(engines, rows)[0], _tokens(engines, rows)
    for options in (
        {"suppress_tokens": [likeliest]},
        {"bad_words_ids": [[likeliest]]},
        {"repetition_penalty": 1.7},
        {"temperature": 1.5, "seed": 3, "top_p": 0.9},
    ):
        assert _tokens(engines, rows, **options) != free, options
    assert all(len(set(one)) == STEPS for one in _tokens(engines, rows, no_repeat_ngram_size=1))
    assert _tokens(engines, rows) == free
    for engine in engines:
        engine.close()
