"""A base's config.json, mutated from a seed: a plan, or a typed error with exit code 2 or 4."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.builds import write_model_project
from support.decoders import write_decoder
from support.families import FAMILIES
from support.home import Home

from loraexport.errors import exit_code
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.errors import LoraexportError

TRIALS = 60
BUILDS = 3
LONGEST = 5.0
"""Seconds of CPU."""
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    -3,
    1,
    7,
    10**5,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "32",
    "x" * 100_000,
    "\0",
    [],
    [1, 2],
    ["a"] * 100,
    {},
    {"": 1},
    {"rope_type": "dynamic"},
    {"rope_type": "nope", "factor": -1},
    json.loads("[" * 90 + "]" * 90),
)
KEYS = (
    "architectures",
    "auto_map",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "layer_types",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "problem_type",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "text_config",
    "torch_dtype",
    "vision_config",
)
"""Keys that transformers knows although a config need not have them."""


def mutated(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Up to three keys of other values, removed or exchanged."""
    chance = random.Random(seed)
    config = json.loads(json.dumps(config))
    for _ in range(chance.randint(1, 3)):
        key = chance.choice([*config, *KEYS])
        way = chance.randrange(6)
        if way == 0:
            config.pop(key, None)
        elif way == 1:
            config[key] = config.get(chance.choice(list(config) or [key]))
        else:
            config[key] = chance.choice(VALUES)
    return config


@pytest.fixture(scope="module")
def bases(home: Home, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Projects whose config.json may be changed: an encoder and a decoder."""
    folders = []
    for number, source in enumerate((home.project(write_model_project), home.project(write_llama))):
        folder = tmp_path_factory.mktemp("bases") / str(number)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("artifacts"))
        folders.append(folder)
    return folders


def write_llama(folder: Path) -> Path:
    return write_decoder(folder, FAMILIES["Llama"])


def attack(folder: Path, seed: int, config: dict[str, Any], out: Path | None) -> str:
    """What went wrong; empty if nothing."""
    (config_file,) = folder.glob("*/config.json")
    config_file.write_text(json.dumps(mutated(config, seed)))
    start = time.process_time()
    try:
        if out is None:
            make_plan(read_spec(folder / "spec.yaml"), folder)
        else:
            build(folder / "spec.yaml", out)
    except LoraexportError as error:
        if exit_code(error) not in (2, 4):
            return f"{seed}: exit {exit_code(error)}: {type(error).__name__}: {str(error)[:300]}"
        if len(str(error)) > 4_000:
            return f"{seed}: an error of {len(str(error))} letters: {str(error)[:300]}"
    except Exception as error:
        return f"{seed}: untyped {type(error).__name__}: {str(error)[:300]}"
    if out is None and time.process_time() - start > LONGEST:
        return f"{seed}: {time.process_time() - start:.1f} s"
    return ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [0, 1], ids=["encoder", "decoder"])
def test_plans_or_says_why_not(bases: list[Path], kind: int) -> None:
    (config_file,) = bases[kind].glob("*/config.json")
    content = config_file.read_text()
    faults = [
        fault
        for seed in range(TRIALS)
        if (fault := attack(bases[kind], seed, json.loads(content), None))
    ]
    config_file.write_text(content)
    assert faults == []


@pytest.mark.filterwarnings("ignore")
def test_builds_or_says_why_not(bases: list[Path], tmp_path: Path) -> None:
    (config_file,) = bases[0].glob("*/config.json")
    content = config_file.read_text()
    faults = [
        fault
        for seed in range(1_000, 1_000 + BUILDS)
        if (fault := attack(bases[0], seed, json.loads(content), tmp_path / "out"))
    ]
    config_file.write_text(content)
    assert faults == []
