"""Time generation of a Llama shape on CUDA: base alone, mixed rows, and PEFT's mixed batch.

    python scripts/measure_llama.py

About 1.2 B random weights in float16, 8 adapters of rank 16 on all seven projections, a row
per adapter in turn. Prompts of 128 tokens, 64 new ones, greedy. The median of alternating rounds:
milliseconds of the prefill, and tokens per second of the decode, all rows together. `captured` is
the runtime's engine with CUDA graphs of the steps; without the word it is onnxruntime-genai.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraexport.bases.grafted import find_sites, load_base, load_graph
from loraexport.bases.layers import pack_adapters
from loraexport.export.graft import graft, save_grafted
from loraexport.plan import make_plan
from loraexport.spec import read_spec
from loraexport_runtime.driven import DrivenEngine
from loraexport_runtime.sampling import Sampling

ROWS, PROMPT, NEW = (8, 32), 128, 64
ADAPTERS, RANK, ROUNDS, PEFT_NEW = 8, 16, 3, 8
SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_project(folder: Path) -> Path:
    """A Llama directory, PEFT adapters on all projections, and a spec."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).half()
    model.save_pretrained(folder / "llama")
    vocabulary = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "llama")
    for index in range(ADAPTERS):
        config_of_lora = LoraConfig(r=RANK, target_modules=SITES, init_lora_weights=False)
        wrapped = get_peft_model(model, config_of_lora)
        wrapped.save_pretrained(folder / f"a{index}")
        model = wrapped.unload()
    adapters = [{"name": f"a{index}", "path": f"a{index}"} for index in range(ADAPTERS)]
    spec = {"version": 1, "name": "llama", "adapters": adapters, "export": {"dtype": "float16"}}
    spec["base"] = {"kind": "causal_lm", "path": "llama"}
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def export(folder: Path, spec: Path) -> None:
    """onnxruntime-genai's graph without sites as `base`, with them as `mixed`."""
    plan = make_plan(read_spec(spec), folder)
    stacks = pack_adapters(plan, load_base(plan))
    for name in ("base", "mixed"):
        model = load_graph(plan, folder / name)
        if name == "mixed":
            graft(model, find_sites(plan, model), stacks, plan.num_slots, "float16")
        save_grafted(model, folder / name / "model.onnx")


def make_prompts(rows: int) -> np.ndarray:
    """int32 [rows, PROMPT]"""
    return np.random.default_rng(0).integers(300, 31000, (rows, PROMPT)).astype(np.int32)


def genai_runner(folder: Path, rows: int, mixed: bool) -> Callable[[], tuple[float, float]]:
    """(seconds of the prefill, seconds of the other tokens) of one batch."""
    config = og.Config(str(folder))
    config.clear_providers()
    config.append_provider("cuda")
    model = og.Model(config)
    ids, slots = make_prompts(rows), 1 + np.arange(rows) % ADAPTERS

    def run() -> tuple[float, float]:
        params = og.GeneratorParams(model)
        length = PROMPT + NEW
        params.set_search_options(batch_size=rows, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        if mixed:
            generator.set_model_input("adapter_ids", slots)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        generator.get_next_tokens()
        middle = time.perf_counter()
        for _ in range(NEW - 1):
            generator.generate_next_token()
        generator.get_next_tokens()
        return middle - start, time.perf_counter() - middle

    return run


def captured_runner(folder: Path, rows: int) -> Callable[[], tuple[float, float]]:
    """The same by the runtime's engine, whose steps are CUDA graphs."""
    engine = DrivenEngine(folder, 0, "cuda", capture=True)
    prompts, slots = make_prompts(rows).tolist(), 1 + np.arange(rows) % ADAPTERS

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        steps = engine.start(prompts, slots, NEW, Sampling())
        next(steps)
        middle = time.perf_counter()
        for _ in steps:
            pass
        return middle - start, time.perf_counter() - middle

    return run


def peft_runner(folder: Path, rows: int) -> Callable[[], tuple[float, float]]:
    """The same with PEFT's `adapter_names` in eager float16; fewer tokens, as it is slow."""
    model: Any = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.half).cuda()
    model = PeftModel.from_pretrained(model, str(folder / "a0"), adapter_name="a0")
    for index in range(1, ADAPTERS):
        model.load_adapter(str(folder / f"a{index}"), adapter_name=f"a{index}")
    model = model.half().eval()
    ids = torch.randint(300, 31000, (rows, PROMPT), device="cuda")
    names = [f"a{index % ADAPTERS}" for index in range(rows)]

    def run() -> tuple[float, float]:
        with torch.no_grad():
            torch.cuda.synchronize()
            start = time.perf_counter()
            found = model(input_ids=ids, use_cache=True, adapter_names=names)
            torch.cuda.synchronize()
            middle = time.perf_counter()
            for _ in range(PEFT_NEW):
                token = found.logits[:, -1:].argmax(-1)
                cache = found.past_key_values
                found = model(
                    input_ids=token, past_key_values=cache, use_cache=True, adapter_names=names
                )
            torch.cuda.synchronize()
            decode = time.perf_counter() - middle
        return middle - start, decode * (NEW - 1) / PEFT_NEW

    return run


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export(folder, make_project(folder))
        print(f"{torch.cuda.get_device_name(0)}, onnxruntime-genai {og.__version__}, float16")
        contestants = ("base", "mixed", "base captured", "mixed captured", "PEFT mixed")
        ratios = (
            ("mixed", "base"),
            ("mixed captured", "base captured"),
            ("mixed", "mixed captured"),
            ("PEFT mixed", "mixed captured"),
        )
        columns = ("rows", "", *contestants, *(f"{one} / {other}" for one, other in ratios))
        print(f"| {' | '.join(columns)} |")
        print(f"| {' | '.join(['---'] * len(columns))} |")
        for rows in ROWS:
            runners = {
                "base": genai_runner(folder / "base", rows, False),
                "mixed": genai_runner(folder / "mixed", rows, True),
                "base captured": captured_runner(folder / "base", rows),
                "mixed captured": captured_runner(folder / "mixed", rows),
                "PEFT mixed": peft_runner(folder, rows),
            }
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
            for run in runners.values():
                run()
            for _ in range(ROUNDS):
                for name, run in runners.items():
                    times[name].append(run())
            for what, index in (("prefill, ms", 0), ("decode, tokens/s", 1)):
                found = {
                    name: statistics.median(one[index] for one in every)
                    for name, every in times.items()
                }
                if index == 0:
                    shown = [f"{1000 * found[name]:.1f}" for name in contestants]
                else:
                    shown = [f"{rows * (NEW - 1) / found[name]:.0f}" for name in contestants]
                over = [f"{found[one] / found[other]:.2f}" for one, other in ratios]
                print(f"| {' | '.join((str(rows), what, *shown, *over))} |", flush=True)


if __name__ == "__main__":
    main()
