"""`loraexport bench`: a tiny run through the command line, workload files, agreement, reports."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from support.bench import BERT, LAYERS, LLAMA

from loraexport.bench import run as bench_run
from loraexport.bench.contest import Contest, Contestant, check_agreement, run_contest
from loraexport.bench.contestants.bound_graph import BoundGraph
from loraexport.bench.contestants.eager import wrap_with_peft
from loraexport.bench.contestants.variants import plan_variant
from loraexport.bench.device import Device
from loraexport.bench.floors import floor, site_floors
from loraexport.bench.report.markdown import to_markdown
from loraexport.bench.results import Cell, Entry, Floor, Results, Timing, read_results
from loraexport.bench.timing import time_works
from loraexport.bench.work import CannotRun, Work
from loraexport.bench.workloads.batches import draw_slots, even_bounds, rows_by_slot
from loraexport.bench.workloads.projects import Lab, layers_spec, model_spec
from loraexport.bench.workloads.schema import LayersWorkload, Workloads, read_workloads
from loraexport.cli import app as cli
from loraexport.errors import ParityError, SpecError, UsageError
from loraexport.plan.costs import WITH_KERNELS, LayerShape, added, read_costs
from loraexport.plan.plan import Plan, make_plan
from loraexport.spec.schema import Costs, CostTerms, TuneSpec
from loraexport_runtime import ProviderError

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"

TINY: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "device": "cpu",
    "threads": 1,
    "rounds": 3,
    "round_ms": 1,
    "workloads": [
        LAYERS
        | {
            "adapters": [2],
            "tokens": [7, 12],
            "strategies": ["masked"],
            "leave_out": ["base torch.compile", "masked torch.compile"],
        },
        BERT
        | {
            "fill": 0.6,
            "variants": ["apart", "features", "blend"],
            "leave_out": ["masked torch", "base torch.compile", "masked torch.compile"],
        },
        LLAMA,
    ],
}
BASES = ["base", "base torch"]
PEERS = ["PEFT", "one at a time"]
CAPTURED = "CUDA graphs need a CUDA device"


def write(folder: Path, data: Any) -> Path:
    path = folder / "workloads.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return path


def workloads(**changes: Any) -> Workloads:
    return Workloads.model_validate_json(json.dumps(TINY | changes))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the entry point in this process: (exit code, stdout, stderr)."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["loraexport", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run_command


# A whole run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command left in its folder for TINY, and what it printed, as printed.json."""
    folder = tmp_path_factory.mktemp("bench")
    command = ["loraexport", "bench", str(write(folder, TINY)), "--out", str(folder / "out")]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr("sys.argv", [*command, "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert not caught.value.code
    (folder / "printed.json").write_text(printed.getvalue())
    return folder / "out"


def test_the_biases_of_a_random_model_are_not_0(tmp_path: Path) -> None:
    """An exporter leaves out those that are, of some operators, and the others pay for them."""
    bench = Workloads.model_validate_json(json.dumps(TINY))
    workload = next(one for one in bench.workloads if one.kind == "model")
    with Device("cpu", 1).active():
        model_spec(workload, Lab(tmp_path, Device("cpu", 1), bench), 1, 2)
    stored = load_file(tmp_path / "base/model.safetensors")
    biases = [value for name, value in stored.items() if name.endswith("bias")]
    assert biases
    assert all(np.abs(value.astype(np.float32)).min() > 0 for value in biases)


def expected_kernels(cell: Cell) -> set[str]:
    """Who is left out where the package is a folder of sources."""
    name = "masked kernels" if cell.kind == "layers" else "mixed kernels"
    if cell.phase == "prefill":
        return {name}
    return {name, f"{name} captured"} | ({f"{name} runtime"} if cell.phase else set())


@pytest.mark.slow
def test_every_contestant_of_every_kind_ran(measured: Path) -> None:
    cells = read_results(measured / "bench.json").cells
    assert [(one.workload, one.phase, one.tokens) for one in cells] == [
        ("layer", "", 7),
        ("layer", "", 12),
        ("bert", "", 15),
        ("llama", "prefill", 15),
        ("llama", "decode", 3),
    ]
    eager = ["segmented torch", "masked torch"]
    decoders = ["base GenAI", "mixed GenAI"]
    variants = ["mixed apart", "mixed features", "mixed blend"]
    expected = {
        "layer": {*BASES, *eager, *PEERS, "masked"},
        "bert": {*BASES, "segmented torch", *PEERS, "mixed", "mixed packed", *variants},
        "llama": {*BASES, *PEERS, *decoders, "mixed"},
    }
    captured = {
        "layer": {"base captured", "masked captured"},
        "bert": {f"{one} captured" for one in ("base", "mixed", *variants)},
        "llama": {"base captured", "mixed captured"},
    }
    runtime = {"base runtime", "mixed runtime"}
    for cell in cells:
        kernels = [name for name in cell.left_out if "kernels" in name]
        assert set(kernels) == expected_kernels(cell)
        missing = {cell.left_out.pop(name) for name in kernels}
        assert all(one.startswith("loraexport-kernels is damaged: ") for one in missing)
        extra = runtime if cell.phase == "decode" else set()
        assert {one.name for one in cell.entries} == expected[cell.workload] | extra
        graphs = captured[cell.workload]
        assert cell.left_out == ({} if cell.phase == "prefill" else dict.fromkeys(graphs, CAPTURED))
        assert cell.ours in expected[cell.workload] | extra
        for entry in cell.entries:
            timing = entry.timing
            assert 0 < timing.lower <= timing.median <= timing.upper
            assert timing.wall > 0
            assert timing.rounds == 3
            assert entry.difference <= (0.5 if cell.phase == "decode" else 1e-3)


def test_the_variants_of_a_model(tmp_path: Path) -> None:
    """Each is another form of the same adapters on the same sites."""
    bench = Workloads.model_validate_json(json.dumps(TINY))
    workload = next(one for one in bench.workloads if one.kind == "model")
    lab = Lab(tmp_path, Device("cpu", 1), bench)

    def make(features: Any = None, **export: Any) -> Plan:
        spec = model_spec(workload, lab, 2, 4, **export)
        return make_plan(spec.model_copy(update={"features": features}), tmp_path)

    plain = make()
    sites = [part.site for one in plain.layers for part in one.layer.slices]
    apart = plan_variant("apart", make)
    assert len(apart.layers) == len(sites) > len(plain.layers)
    assert [part.site for one in apart.layers for part in one.layer.slices] == sites
    assert {len(one.layer.slices) for one in plain.layers} == {1, 3}
    features = plan_variant("features", make)
    roles = {stack.role for one in features.layers for stack in one.layer.stacks}
    assert roles == {"lora_A", "lora_B", "output_scale", "bias"}
    blend = plan_variant("blend", make)
    assert blend.spec.export.blend
    assert not plain.spec.export.blend


@pytest.mark.slow
def test_floors_are_the_plans_numbers(measured: Path) -> None:
    layer, _, bert, *_ = read_results(measured / "bench.json").cells
    base, mixed = layer.floors["base"], layer.floors["mixed"]
    size, tokens, width, rank = 4, 7, 32, 4
    assert base.bytes == size * (width * width + tokens * 2 * width)
    assert base.flops == 2 * tokens * width * width
    assert mixed.bytes - base.bytes == size * layer.used * rank * 2 * width
    assert mixed.flops - base.flops == 2 * tokens * rank * 2 * width
    assert base.seconds is None, "a CPU's peak is not known"
    per_layer = 4 * 32 * 32 + 2 * 32 * 48  # attention, and the two of the feed-forward
    assert bert.floors["base"].flops == 2 * 15 * (per_layer + 32 * 32)  # and the pooler


@pytest.mark.slow
def test_the_environment_is_recorded(measured: Path) -> None:
    found = read_results(measured / "bench.json").environment
    assert {"date", "device", "host", "python", "torch", "onnxruntime", "peft"} <= set(found)


@pytest.mark.slow
def test_the_table_has_a_row_for_each_cell_and_contestant(measured: Path) -> None:
    text = (measured / "bench.md").read_text()
    lines = text.splitlines()
    starts = [line.split(" |")[0] for line in lines if line.startswith("| ")]
    for row in ("| 7 tokens", "| 12 tokens", "| 3 x 5", "| prefill", "| decode"):
        assert row in starts
    for name in (*BASES, *PEERS, "masked", "mixed GenAI", "segmented torch"):
        assert f"| {name}" in starts
        assert f"- {name}: " in text
    assert "| µs per layer | 7 tokens | 12 tokens |" in lines
    assert "ours, tokens/s" in text
    assert f"- not run: base captured, mixed captured: {CAPTURED}" in lines
    ratios = next(line for line in lines if line.startswith("| 7 tokens | masked |"))
    cell = read_results(measured / "bench.json").cells[0]
    ours, base = cell.seconds("masked"), cell.seconds("base")
    assert ours is not None
    assert base is not None
    assert ratios.split(" | ")[2] == f"{ours / base:.{2 if ours / base < 10 else 1}f}"


@pytest.mark.slow
def test_the_plots_are_png_files(measured: Path) -> None:
    found = {path.name: path.read_bytes() for path in measured.glob("*.png")}
    assert set(found) == {"layer-tokens.png", "overhead.png", "peers.png"}
    for name, data in found.items():
        assert data.startswith(PNG), name
        assert len(data) > 5000, f"{name} shows something"


@pytest.mark.slow
def test_tables_and_plots_again_from_the_results(measured: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("--from", measured / "bench.json", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert out.rstrip() == (measured / "bench.md").read_text().rstrip()
    for file in measured.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_json_is_what_the_file_holds(measured: Path) -> None:
    printed = json.loads((measured.parent / "printed.json").read_text())
    assert printed == json.loads((measured / "bench.json").read_text())
    assert printed["workloads"]["workloads"][0]["tokens"] == [7, 12]


@pytest.mark.slow
def test_without_matplotlib_the_rest_is_written(
    measured: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = read_results(measured / "bench.json")
    missing = bench_run.write_report(results, tmp_path)
    assert str(missing) == (
        "plots need matplotlib; install 'loraexport[bench]', then 'loraexport bench --from"
        f" {tmp_path}/bench.json --out {tmp_path}'"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    code, out, err = run("--from", measured / "bench.json", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "UsageError: plots need matplotlib" in err


def test_without_peft_no_model_can_be_made(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    path = write(tmp_path, TINY | {"workloads": [TINY["workloads"][1]]})
    code, _, err = run(path, "--out", tmp_path / "out")
    assert code == 2
    assert "workload 'bert' needs peft to make adapters; install 'loraexport[bench]'" in err
    with pytest.raises(CannotRun, match=r"peft is not installed; install 'loraexport\[bench\]'"):
        wrap_with_peft(torch.nn.Linear(1, 1), tmp_path, ["a1"])


# Workload files


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        read_workloads(write(folder, text))
    prefix = f"{folder}/workloads.yaml:"
    return [line.removeprefix(prefix) for line in str(caught.value).splitlines()]


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    text = """\
version: 1
name: bad
device: gpu
dtype: bfloat16
rounds: 2
workloads:
  - kind: layers
    name: a
    in_features: 64
    out_features: 32
    chain: 2
    adapters: 8
    tokens: [8, "64"]
    tokns: [8]
  - name: a
    adapters: [1]
  - kind: model
    name: m
    config: {model_type: bert, hiden_size: 3}
    adapters: [1]
    shapes: [{rows: 1, token: 2}]
  - kind: other
    name: o
  - kind: generation
    name: g
    config: {model_type: lama}
    adapters: [1]
    rows: []
  - kind: generation
    name: h
    config: {}
    adapters: [1]
    rows: [1]
    rows: [2]
    weights: int4
    zzz: 1
"""
    import transformers

    known = f"transformers {transformers.__version__} knows no model of type 'lama'"
    kinds = "kind: layers, kind: model, kind: generation, kind: engine"
    assert problems(tmp_path, text) == [
        "3: device: expected 'cpu' or 'cuda', got 'gpu' (choose one)",
        "5: rounds: should be greater than or equal to 3, got 2",
        "11: workloads[0].chain: 2 layers of which each takes what the one before it gives (make"
        " in_features and out_features equal, or leave chain out)",
        "12: workloads[0].adapters: expected list, got 8 (start each item with '- ')",
        "13: workloads[0].tokens[1]: expected integer, got '64' (write it without quotes)",
        "14: workloads[0].tokns: unknown key (did you mean 'tokens'?)",
        "15: workloads[1].name: two are named 'a', the first on line 8 (give each its own name)",
        f"15: workloads[1].kind: required key is missing (add one of {kinds})",
        "19: workloads[2].config.hiden_size: unknown key (did you mean 'hidden_size'?)",
        "21: workloads[2].shapes[0].tokens: required key is missing (add it)",
        "21: workloads[2].shapes[0].token: unknown key (did you mean 'tokens'?)",
        "22: workloads[3].kind: expected 'layers', 'model', 'generation', 'engine', got 'other'"
        " (choose one)",
        f"26: workloads[4].config.model_type: {known} (write it as a config.json does)",
        "28: workloads[4].rows: empty (give at least one)",
        "31: workloads[5].config.model_type: required key is missing (add it, as model_type: bert)",
        "34: workloads[5].rows: duplicate key, first given on line 33 (remove one of the two)",
        "35: workloads[5].weights: int4 weights beside bfloat16 (take float16 or float32)",
        "36: workloads[5].zzz: unknown key (remove it; specs/bench/ has examples)",
    ]


def test_a_file_that_is_not_there_or_empty(tmp_path: Path, run: Run) -> None:
    code, _, err = run(tmp_path / "none.yaml")
    assert code == 2
    assert "1: no such file (give the path of a file of workloads, as specs/bench/cpu.yaml)" in err
    assert problems(tmp_path, "") == ["1: the file is empty (specs/bench/ has examples)"]


@pytest.mark.parametrize(
    "name", ["cpu", "engine", "engine-cpu", "h200", "kernels", "padding", "variants"]
)
def test_the_files_of_the_repository_can_be_read(name: str) -> None:
    assert read_workloads(ROOT / f"specs/bench/{name}.yaml").name == name


def test_usage(tmp_path: Path, run: Run) -> None:
    code, _, err = run()
    assert code == 2
    assert "give either a file of workloads, as specs/bench/cpu.yaml, or --from" in err
    (tmp_path / "bench.json").write_text('{"format": 2}')
    with pytest.raises(UsageError, match=r"no results of this version of 'loraexport bench': "):
        read_results(tmp_path / "bench.json")
    with pytest.raises(UsageError, match="No such file or directory; give the bench"):
        read_results(tmp_path / "none.json")


def test_cuda_that_cannot_run_is_an_error(tmp_path: Path, run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("it can")
    code, _, err = run(write(tmp_path, TINY | {"device": "cuda"}), "--out", tmp_path / "out")
    assert code == 2
    assert "ProviderError: CUDAExecutionProvider" in err
    with pytest.raises(ProviderError):
        Device("cuda", None)


# The rows of a batch


def test_distributions() -> None:
    assert draw_slots("one", 3, 8, 0) == [1, 1, 1]
    assert draw_slots("distinct", 5, 3, 0) == [1, 2, 3, 1, 2]
    uniform, zipf = (draw_slots(one, 6000, 4, 0) for one in ("uniform", "zipf"))  # type: ignore[arg-type]
    assert draw_slots("uniform", 6000, 4, 0) == uniform
    shares = [np.bincount(slots, minlength=5)[1:] / 6000 for slots in (uniform, zipf)]
    assert np.abs(shares[0] - 0.25).max() < 0.03
    harmonic = 1 / np.arange(1, 5)
    assert np.abs(shares[1] - harmonic / harmonic.sum()).max() < 0.03


def test_bounds_and_groups() -> None:
    assert even_bounds(7, 3) == [0, 2, 4, 7]
    assert even_bounds(12, 3) == [0, 4, 8, 12]
    assert rows_by_slot([2, 1, 2, 3]) == {1: [1], 2: [0, 2], 3: [3]}


def test_ranks_that_adapters_take_in_turn(tmp_path: Path) -> None:
    data = TINY["workloads"][0] | {"ranks": [2, 4], "adapters": [3]}
    plain, mixed = workloads(
        workloads=[data, data | {"name": "mixed", "mix_ranks": True}]
    ).workloads
    assert isinstance(plain, LayersWorkload)
    assert isinstance(mixed, LayersWorkload)
    assert plain.rank_sets == ((2,), (4,))
    assert mixed.rank_sets == ((2, 4),)
    lab = Lab(tmp_path, Device("cpu", 1), workloads())
    plan = make_plan(layers_spec(mixed, lab, 3, (2, 4)), tmp_path)
    assert [adapter.header.max_rank for adapter in plan.adapters] == [2, 4, 2]
    assert plan.max_rank == 4
    one = cell().model_copy(update={"ranks": (2, 4)})
    assert (one.rank_label, cell().rank_label) == ("ranks 2 to 4", "rank 4")


# Contestants


def cell() -> Cell:
    least = Floor(bytes=1, flops=1, seconds=None)
    return Cell(
        workload="w",
        kind="layers",
        phase="",
        unit="layer",
        adapters=2,
        used=2,
        rank=4,
        rows=2,
        tokens=6,
        ours=None,
        floors={"base": least, "mixed": least},
        entries=(),
        left_out={},
    )


def contestant(name: str, y: np.ndarray, units: int = 1) -> Contestant:
    group = "base" if name.startswith("base") else "mixed"
    return Contestant(name, group, lambda: Work([lambda: None], lambda: y, units))  # type: ignore[arg-type]


BASE, MIXED = np.ones((6, 3), np.float32), np.linspace(1, 3, 18, dtype=np.float32).reshape(6, 3)


def test_a_wrong_contestant_is_an_error() -> None:
    """One row of six as the base has it: no time of it is taken."""
    wrong = MIXED.copy()
    wrong[4] = BASE[4]
    both = [contestant("base", BASE), contestant("segmented torch", MIXED)]
    contest = Contest(cell(), [*both, contestant("masked", wrong)], ["masked"])
    expected = (
        r"workload 'w', 2 adapters of rank 4, 2 rows, 6 tokens: 'masked' disagrees with 'segmented"
        r" torch': difference 5\.5e-01, allowed 1e-03; a time of wrong numbers says nothing"
    )
    with pytest.raises(ParityError, match=expected):
        run_contest(contest, workloads(), Device("cpu", 1))
    passed = run_contest(Contest(cell(), both, ["masked"]), workloads(), Device("cpu", 1))
    assert [one.name for one in passed.entries] == ["base", "segmented torch"]
    assert passed.ours is None


def test_a_run_with_a_wrong_contestant_fails(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraexport.bench.contestants import layers

    monkeypatch.setattr(layers, "rows_by_slot", lambda slots: {1: list(range(len(slots)))})
    others = ["PEFT", "masked torch", "base torch.compile", "masked torch.compile"]
    layer = TINY["workloads"][0] | {"tokens": [12], "leave_out": others}
    path = write(tmp_path, TINY | {"workloads": [layer]})
    code, out, err = run(path, "--out", tmp_path)
    assert code == 3
    assert "ParityError: workload 'layer'" in err
    assert "'one at a time' disagrees with 'segmented torch'" in err
    assert "- not timed: workload 'layer'" in out
    results = read_results(tmp_path / "bench.json")
    assert results.cells == ()
    assert len(results.disagreements) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_disagree(bad: float) -> None:
    wrong = MIXED.copy()
    wrong[0, 0] = bad
    with pytest.raises(ParityError, match="'b' disagrees with 'a'"):
        check_agreement("here", {"a": MIXED, "b": wrong}, {"a": "mixed", "b": "mixed"}, "float32")


def test_shapes_tokens_and_adapters_that_do_nothing() -> None:
    groups: Any = {"base": "base", "a": "mixed", "b": "mixed"}
    with pytest.raises(ParityError, match="difference inf"):
        check_agreement("here", {"a": MIXED, "b": MIXED[:2]}, groups, "float32")
    tokens = np.arange(8).reshape(4, 2)
    other = tokens.copy()
    other[:2] += 1
    assert check_agreement("here", {"a": tokens, "b": other}, groups, "float32")["b"] == 0.5
    other[2] += 1
    with pytest.raises(ParityError, match=r"difference 7\.5e-01, allowed 5e-01"):
        check_agreement("here", {"a": tokens, "b": other}, groups, "float32")
    with pytest.raises(ParityError, match=r"move the base's output by 0\.0e\+00 only"):
        check_agreement("here", {"base": BASE, "a": BASE}, groups, "float32")


def test_who_cannot_run_is_left_out_with_the_reason(tmp_path: Path) -> None:
    device = Device("cpu", 1)

    def refuse() -> Work:
        raise RuntimeError("/tmp/loraexport-bench-x1/base.onnx: no such kernel\nand more")

    def capture() -> Work:
        BoundGraph(tmp_path / "none.onnx", device, captured=True)
        raise AssertionError("not reached")

    contestants = [
        contestant("base", BASE),
        Contestant("base torch", "base", refuse),
        Contestant("masked captured", "mixed", capture),
        contestant("masked", MIXED),
    ]
    found = run_contest(
        Contest(cell(), contestants, ["masked captured", "masked"]), workloads(), device
    )
    assert found.left_out == {
        "base torch": "RuntimeError: base.onnx: no such kernel",
        "masked captured": CAPTURED,
    }
    assert found.ours == "masked"
    results = Results(environment={"device": "d"}, workloads=workloads(), cells=(found,))
    text = to_markdown(results)
    assert "- not run: base torch: RuntimeError: base.onnx: no such kernel" in text
    assert f"- not run: masked captured: {CAPTURED}" in text


def test_rounds_alternate_and_turn_the_order() -> None:
    order: list[str] = []

    def work(name: str, **options: Any) -> Work:
        calls = [lambda copy=copy: order.append(f"{name}{copy}") for copy in (0, 1)]
        return Work(calls, lambda: BASE, **options)

    started: list[str] = []
    works = {
        "a": work("a"),
        "b": work("b", prepare=lambda: started.append("b"), units=5),
        "c": work("c"),
    }
    found = time_works(works, 3, 0.0, Device("cpu", 1))
    # Warm-up: both copies and one more; then a round each, the inputs in turn.
    assert order[:9] == ["a0", "a1", "a0", "b0", "b1", "b0", "c0", "c1", "c0"]
    assert [one[0] for one in order[9:]] == list("abcbcacab")
    assert [one for one in order[9:] if one[0] == "a"] == ["a1", "a0", "a1"]
    assert len(started) == 6
    assert all(timing.rounds == 3 and timing.calls == 1 for timing in found.values())


def test_copies_exceed_the_l2() -> None:
    device = Device("cpu", 1)
    assert device.num_copies(1) == 2
    device._l2_bytes = 50 << 20
    assert device.num_copies(200 << 20) == 2
    assert device.num_copies(20 << 20) == 5
    assert device.num_copies(1) == 8


def test_a_floor_is_the_larger_of_bytes_and_flops() -> None:
    device = Device("cpu", 1)
    assert floor(device, 10, 10, "float16") == Floor(bytes=10, flops=10, seconds=None)
    device.kind, device.name = "cuda", "NVIDIA H200"
    assert floor(device, 4_800_000, 1, "float16").seconds == pytest.approx(1e-6)
    assert floor(device, 1, 989_000_000, "float16").seconds == pytest.approx(1e-6)
    device.name = "another"
    assert floor(device, 1, 1, "float16").seconds is None


def plan_of(**changes: Any) -> Any:
    """Two layers' sites as the floors read them."""
    stack = SimpleNamespace(in_features=64, out_features=32, strategy="masked")
    layer = SimpleNamespace(
        layer=stack,
        num_slots=4,
        base_bytes=2 * 64 * 32,
        lora_bytes=2 * 4 * 8 * (64 + 32),
        base_flops_per_token=2 * 64 * 32,
        lora_flops_per_token=2 * 4 * 8 * (64 + 32),
    )
    base = SimpleNamespace(kind="causal_lm", weights="float")
    spec = SimpleNamespace(export=SimpleNamespace(dtype="float16"), base=base)
    vars(base).update(changes)
    return SimpleNamespace(spec=spec, layers=[layer])


def test_floors_of_int4_and_of_ranks_that_differ() -> None:
    """Half a byte a value and a scale for each 32; of a slot's ranks those that are there."""
    device = Device("cpu", 1)
    base = site_floors(plan_of(), 10, 2, device)["base"]
    int4 = site_floors(plan_of(weights="int4"), 10, 2, device)["base"]
    assert base.bytes - int4.bytes == 2 * 64 * 32 - (64 * 32 // 2 + 2 * 64 * 32 // 32)
    assert base.flops == int4.flops
    whole, half = (site_floors(plan_of(), 10, 2, device, 1, share) for share in (1.0, 0.5))
    for name in ("bytes", "flops"):
        more = [getattr(one["mixed"], name) - getattr(one["base"], name) for one in (whole, half)]
        assert more[0] == 2 * more[1] > 0


# Calibration


SIZES = (32, 32)
"""Of the layers of TINY."""


def timed(seconds: dict[str, float], **changes: Any) -> Cell:
    """A cell whose contestants took so long."""
    entries = [
        Entry(
            name=name,
            group="base" if name.startswith("base") else "mixed",
            timing=Timing(median=took, lower=took, upper=took, wall=took, rounds=3, calls=1),
            difference=0.0,
        )
        for name, took in seconds.items()
    ]
    return cell().model_copy(update={"workload": "layer", "entries": tuple(entries), **changes})


def captured_at(costs: Costs) -> Results:
    """Layers that were captured, at what the costs say; half of the slots in use."""
    found = []
    for tokens in (8, 512, 8192):
        stock = LayerShape(tokens, *SIZES, 4, 4, 4, has_bias=True)
        seconds = {
            f"{one} captured": 50.0 + added(costs, one, stock)
            for one in ("masked", "augmented", "chunked")
        }
        if costs.kernels is not None:
            used = LayerShape(tokens, *SIZES, 2, 4, 4, has_bias=True)
            seconds |= {
                f"{one} kernels captured": 50.0 + added(costs, one, used, with_kernels=True)
                for one in WITH_KERNELS
            }
        seconds = {name: took / 1e6 for name, took in seconds.items()}
        sizes = {"tokens": tokens, "adapters": 4, "used": 2}
        found.append(timed({"base captured": 50e-6, **seconds}, **sizes))
    # Ranks that differ: times that would spoil the fit.
    differ = {"ranks": (1, 4), "adapters": 4}
    found.append(timed({"base captured": 1.0, "masked captured": 9.0}, **differ))
    environment = {"device": "made up"}
    return Results(environment=environment, workloads=workloads(), cells=tuple(found))


@pytest.mark.parametrize("kernels", [None, CostTerms(launch=1.5, gbyte=500.0, gflop=20.0)])
def test_calibrate_fits_the_costs_of_a_run(
    kernels: CostTerms | None, run: Run, tmp_path: Path
) -> None:
    """And what it prints is part of a spec."""
    costs = Costs(device="made up", launch=2.5, gbyte=300.0, gflop=40.0, kernels=kernels)
    (tmp_path / "bench.json").write_text(captured_at(costs).model_dump_json())
    arguments = ("--from", tmp_path / "bench.json", "--out", tmp_path / "out", "--calibrate")
    code, _, said = run(*arguments)
    assert code == 0
    found = read_costs(tmp_path / "out/costs.json")
    assert (found.kernels is None) == (kernels is None)
    for expected, fitted in ((costs, found), (costs.kernels, found.kernels)):
        for name in ("launch", "gbyte", "gflop") if expected else ():
            assert getattr(fitted, name) == pytest.approx(getattr(expected, name), rel=0.02)
    lines = yaml.safe_load(said.split("For the spec of a build:\n", 1)[1])
    read = TuneSpec.model_validate_json(json.dumps(lines["export"]["tune"]))
    assert read.costs == found


def test_nothing_to_calibrate_with(run: Run, tmp_path: Path) -> None:
    results = captured_at(read_costs()).model_copy(update={"cells": (timed({"base": 1.0}),)})
    (tmp_path / "bench.json").write_text(results.model_dump_json())
    code, _, said = run("--from", tmp_path / "bench.json", "--out", tmp_path, "--calibrate")
    assert code == 2
    assert "no layer of this run was captured" in said


# The fastest base


def test_the_fastest_base_is_whichever_took_least() -> None:
    """Every contestant over it, and ours over the base that runs as it does too."""
    seconds = {
        "base": 3e-6,
        "base captured": 2e-6,
        "base torch": 1.6e-6,
        "base torch.compile": 1.5e-6,
        "masked torch.compile": 6e-6,
        "masked kernels captured": 2.4e-6,
    }
    one = timed(seconds, ours="masked kernels captured")
    assert one.fastest_base == "base torch.compile"
    none = timed({}, tokens=7)
    assert none.fastest_base is None
    results = Results(environment={"device": "d"}, workloads=workloads(), cells=(one, none))
    lines = to_markdown(results).splitlines()
    columns = lines[lines.index("## layer") + 4]
    assert columns.startswith("|  | ours | ours / base | fastest base | ours / fastest base | ")
    row = "| 6 tokens | masked kernels captured | 1.20 | base torch.compile | 1.60 | 2.50 | 1.25 |"
    assert row in lines
    assert "| 7 tokens | none ran |  | none ran |  |  |  |" in lines
    table = lines[lines.index("| over the fastest base | 6 tokens | 7 tokens |") + 2 :]
    assert table[:6] == [
        "| base | 2.00 |  |",
        "| base captured | 1.33 |  |",
        "| base torch | 1.07 |  |",
        "| base torch.compile | 1.00 |  |",
        "| masked torch.compile | 4.00 |  |",
        "| masked kernels captured | 1.60 |  |",
    ]
    assert (
        "- masked kernels captured: this project's graph, by that strategy, as a CUDA graph,"
        " its functions computed by loraexport-kernels"
    ) in lines
