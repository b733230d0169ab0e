"""Time a BERT-base shape on CUDA: base alone, mixed rows, and PEFT's mixed batch, in one run.

Then the mixed graph by its parts: sites apart, so that q, k and v share nothing; places for DoRA
and biases; a blend.

    python scripts/measure_bert.py

Random weights, float16, 8 adapters of rank 16 on every linear layer, a row per adapter in turn.
Each cell is the median of alternating rounds, in milliseconds, inputs and outputs on the device.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from loraexport.bases.model import load_model
from loraexport.export.onnx import export_model_onnx
from loraexport.plan import model as model_plan
from loraexport.plan.plan import make_plan
from loraexport.spec.schema import read_spec

SHAPES = ((8, 64), (32, 128), (64, 512))
ADAPTERS, RANK, ROUNDS, RUNS = 8, 16, 5, 10


Share = Callable[..., list[tuple[str, ...]]]


def apart(share: Share) -> Share:
    """Every site by itself."""
    return lambda *args: [(site,) for group in share(*args) for site in group]


def export_mixed(folder: Path, spec: Path, name: str, **changes: Any) -> None:
    """The mixed graph of a spec with some keys changed, as `name`.onnx."""
    data = yaml.safe_load(spec.read_text())
    data["export"] |= changes.pop("export", {})
    changed = folder / f"{name}.yaml"
    changed.write_text(yaml.safe_dump({**data, **changes}))
    _, modules = load_model(make_plan(read_spec(changed), folder))
    export_model_onnx(modules, name, folder / f"{name}.onnx")


def make_project(folder: Path) -> Path:
    """A BERT-base directory, PEFT adapters on all linear layers, and a spec."""
    torch.manual_seed(0)
    plain = BertModel(BertConfig())
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):  # 0 otherwise, and an exporter may leave that out
            torch.nn.init.normal_(parameter, std=0.02)
    plain.save_pretrained(folder / "bert")
    for index in range(ADAPTERS):
        config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(BertModel.from_pretrained(folder / "bert"), config)
        model.save_pretrained(folder / f"a{index}")
    base = {"kind": "transformers", "path": "bert", "task": "feature-extraction"}
    adapters = [{"name": f"a{index}", "path": f"a{index}"} for index in range(ADAPTERS)]
    spec = {"version": 1, "name": "bert", "base": base, "adapters": adapters}
    spec["export"] = {"dtype": "float16", "formats": ["onnx"]}
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def onnx_runner(path: Path, batch: int, sequence: int, mixed: bool) -> Callable[[], Any]:
    """One call of a graph over bound device buffers."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    ids = torch.randint(1, 1000, (batch, sequence), device="cuda")
    feeds = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    if mixed:
        feeds["adapter_ids"] = 1 + torch.arange(batch, device="cuda") % ADAPTERS
    y = torch.empty(batch, sequence, 768, device="cuda", dtype=torch.half)
    for name, tensor in feeds.items():
        binding.bind_input(name, "cuda", 0, 7, list(tensor.shape), tensor.data_ptr())
    binding.bind_output("last_hidden_state", "cuda", 0, 10, list(y.shape), y.data_ptr())
    keep = (feeds, y)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return keep

    return run


def peft_runner(folder: Path, batch: int, sequence: int) -> Callable[[], Any]:
    """PEFT's mixed batch, `adapter_names`, in eager float16 with SDPA."""
    model: Any = BertModel.from_pretrained(folder / "bert", dtype=torch.half).cuda()
    model = PeftModel.from_pretrained(model, str(folder / "a0"), adapter_name="a0")
    for index in range(1, ADAPTERS):
        model.load_adapter(str(folder / f"a{index}"), adapter_name=f"a{index}")
    model = model.half().eval()
    ids = torch.randint(1, 1000, (batch, sequence), device="cuda")
    names = [f"a{index % ADAPTERS}" for index in range(batch)]

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=ids * 0 + 1, adapter_names=names)

    return run


def median_ms(runners: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median over rounds that alternate the contestants; each round ends with a synchronise."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        for _ in range(3):
            run()
    for _ in range(ROUNDS):
        for name, run in runners.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(RUNS):
                run()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / RUNS * 1000)
    return {name: statistics.median(one) for name, one in times.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spec = make_project(folder)
        export_mixed(folder, spec, "mixed")
        export_mixed(folder, spec, "features", features=["dora", "bias"])
        export_mixed(folder, spec, "blend", export={"blend": True})
        model_plan.share_inputs = apart(model_plan.share_inputs)
        export_mixed(folder, spec, "apart")
        plain = BertModel.from_pretrained(folder / "bert", dtype=torch.half).eval()
        ids = torch.ones(3, 7, dtype=torch.int64)
        batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
        torch.onnx.export(
            plain,
            (ids, ids, ids * 0),
            folder / "base.onnx",
            dynamo=True,
            opset_version=23,
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=["last_hidden_state", "pooled"],
            dynamic_shapes=({0: batch, 1: sequence},) * 3,
            verbose=False,
        )
        print(f"{torch.cuda.get_device_name(0)}, onnxruntime {ort.__version__}, float16")
        variants = ("apart", "features", "blend")
        columns = ("rows x tokens", "base", "mixed", "PEFT mixed", "mixed / base", "PEFT / mixed")
        print(f"| {' | '.join((*columns, *variants))} |")
        for rows, tokens in SHAPES:
            graphs = ("base", "mixed", *variants)
            runners = {
                name: onnx_runner(folder / f"{name}.onnx", rows, tokens, name != "base")
                for name in graphs
            }
            found = median_ms({**runners, "peft": peft_runner(folder, rows, tokens)})
            base, mixed, peft = found["base"], found["mixed"], found["peft"]
            cells = [f"{rows} x {tokens}", f"{base:.2f}", f"{mixed:.2f}", f"{peft:.2f}"]
            cells += [f"{mixed / base:.2f}", f"{peft / mixed:.1f}"]
            cells += [f"{found[name]:.2f}" for name in variants]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
