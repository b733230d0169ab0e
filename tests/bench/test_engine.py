"""Workloads of kind engine: what is drawn, what is refused, a tiny run, and how it is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from loraexport.bench import run as bench_run
from loraexport.bench.engine.asks import Ask, draw_traffic, log_uniform
from loraexport.bench.report.markdown import to_markdown
from loraexport.bench.results import EngineCase, Figure, Results, read_results
from loraexport.bench.workloads.schema import EngineWorkload, Workloads, read_workloads
from loraexport.errors import SpecError

ENGINE: dict[str, Any] = {
    "kind": "engine",
    "name": "llama",
    "config": {
        "model_type": "llama",
        "vocab_size": 80,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    },
    "adapters": [2],
    "ranks": [4],
    "rows": 3,
    "quota": 16,
    "traffic": {"requests": 7, "prompt_tokens": [3, 20], "new_tokens": [2, 9]},
    # So long that no short prompt comes too late, however busy the machine is.
    "arrival": {"decoding": 2, "long_prompt_tokens": 250, "prompt_tokens": 6, "times": 4},
    "chat": {"prompt_tokens": 120, "new_tokens": 5, "times": 2},
}
TINY: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "device": "cpu",
    "threads": 1,
    "rounds": 3,
    "workloads": [ENGINE],
}


def workloads(**changes: Any) -> Workloads:
    return Workloads.model_validate_json(json.dumps(TINY | {"workloads": [ENGINE | changes]}))


def draw(turn: int) -> list[Ask]:
    traffic = {"requests": 2000, "prompt_tokens": [32, 512], "new_tokens": [16, 256]}
    workload = workloads(traffic=traffic).workloads[0]
    assert isinstance(workload, EngineWorkload)
    assert workload.traffic is not None
    return draw_traffic(workload, workload.traffic, 8, 100, 0, turn)


def test_lengths_are_log_uniform() -> None:
    """Each doubling has the same share; the mean from a to b is (b - a) / log(b / a)."""
    numbers = np.array(log_uniform(np.random.default_rng(0), (32, 512), 20_000))
    assert (numbers.min(), numbers.max()) == (32, 512)
    shares = np.histogram(numbers, [32, 64, 128, 256, 513])[0] / 20_000
    assert np.abs(shares - 0.25).max() < 0.02
    assert abs(numbers.mean() / (480 / np.log(16)) - 1) < 0.02
    assert set(log_uniform(np.random.default_rng(0), (5, 5), 10)) == {5}


def test_rounds_have_the_same_lengths_and_other_tokens() -> None:
    first, again, second = draw(0), draw(0), draw(1)
    for one, same, other in zip(first, again, second, strict=True):
        assert one.tokens.tolist() == same.tokens.tolist()
        assert len(one.tokens) == len(other.tokens)
        assert (one.slot, one.new_tokens) == (other.slot, other.new_tokens)
        assert one.tokens.tolist() != other.tokens.tolist()
        assert one.tokens.min() >= 3
    assert [one.slot for one in first[:9]] == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    request = first[0].request()
    assert (request.adapter, request.ignore_eos) == ("1", True)


def test_what_is_refused(tmp_path: Path) -> None:
    nothing = {key: ENGINE[key] for key in ("kind", "name", "config", "adapters")}
    traffic = {"requests": 7, "prompt_tokens": [20, 3], "new_tokens": [1, 9], "rows": 3}
    wrong = ENGINE | {"name": "wrong", "traffic": traffic, "quota": 1}
    path = tmp_path / "workloads.yaml"
    path.write_text(yaml.safe_dump(TINY | {"workloads": [nothing, wrong]}, sort_keys=False))
    with pytest.raises(SpecError) as caught:
        read_workloads(path)
    found = [line.split(": ", 1)[1] for line in str(caught.value).splitlines()]
    assert sorted(found) == [
        "workloads[0]: nothing to measure (add one of traffic, arrival, chat)",
        "workloads[1].quota: should be greater than or equal to 2, got 1",
        "workloads[1].traffic.new_tokens[0]: should be greater than or equal to 2, got 1",
        "workloads[1].traffic.prompt_tokens: the shortest is 20, and the longest 3 (write the"
        " smaller one first)",
        "workloads[1].traffic.rows: unknown key (remove it; specs/bench/ has examples)",
    ]


def test_the_report_of_a_case() -> None:
    figures = (
        Figure(name="engine", unit="tokens/s", value=12345.6),
        Figure(name="steps made", unit="count", value=23),
        Figure(name="engine / engine static, tokens/s", unit="ratio", value=1.7254),
    )
    case = EngineCase(
        workload="llama",
        case="traffic",
        adapters=2,
        rank=4,
        rows=3,
        figures=figures,
        left_out={"GenAI static": "onnxruntime-genai is not installed"},
    )
    bench = workloads()
    results = Results(environment={"device": "d"}, workloads=bench, cells=(), engines=(case,))
    lines = to_markdown(results).splitlines()
    assert "## llama, traffic" in lines
    assert "kind engine; 2 adapters of rank 4, 3 rows; a round is all requests." in lines
    assert "| engine | 12,346 tokens/s |" in lines
    assert "| steps made | 23 |" in lines
    assert "| engine / engine static, tokens/s | 1.73 |" in lines
    assert "- not run: GenAI static: onnxruntime-genai is not installed" in lines
    assert any(line.startswith("- engine: this project's graph") for line in lines)


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    results = bench_run.run(workloads(), tmp_path)
    assert results.disagreements == ()
    assert read_results(tmp_path / "bench.json") == results
    traffic, arrival, chat = results.engines
    assert [one.case for one in results.engines] == ["traffic", "arrival", "chat"]
    values = {figure.name: figure.value for figure in traffic.figures}
    assert traffic.left_out == {}
    assert {"engine", "engine static", "GenAI static"} <= values.keys()
    ratio = values["engine"] / values["engine static"]
    assert values["engine / engine static, tokens/s"] == pytest.approx(ratio)
    used = values["GenAI static, of a processor"] / values["engine, of a processor"]
    assert values["GenAI static / engine, of a processor"] == pytest.approx(used)
    alone = values["all steps, alone"] + values["all prompts in full batches, alone"]
    share = values["steps and prompts alone / whole time"]
    assert share == pytest.approx(alone / values["the engine's whole time"])
    values = {figure.name: figure.value for figure in arrival.figures}
    assert 2 <= values["prompts that came"] <= 4
    parts = values["a chunk of 16 tokens, median"] + values["the short prompt's own run, median"]
    bound = parts + 4 * values["a step of 3 rows, median"]
    p95 = values["first token of a short prompt, p95"]
    assert values["p95 / (chunk + 4 steps + own run)"] == pytest.approx(p95 / bound)
    values = {figure.name: figure.value for figure in chat.figures}
    assert values["tokens that the second turn did not read again"] == 124
    turns = [values[f"{turn} turn, time to first token"] for turn in ("second", "first")]
    assert values["second turn / first turn"] == pytest.approx(turns[0] / turns[1])
