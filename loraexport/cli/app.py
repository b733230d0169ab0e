"""The command line: arguments -> functions; errors -> one readable block and an exit code."""

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import loraexport
from loraexport_runtime.adapters.files import CONFIG_FILE, describe_inner
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.contract.files import MANIFEST_FILE, digest_file
from loraexport_runtime.contract.foreign import reason
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import LoraexportError

from ..errors import BaseModelError, ParityError, UsageError, exit_code
from .console import err_console, out_console, print_error, print_json, print_tree, show_progress
from .show_parity import print_report, report_dict
from .stop import Stopped, stoppable

EXIT_CODES = (
    "Exit codes: 0 done; 1 a fault of our own, or a full disk; 2 the spec or the usage is wrong;"
    " 3 parity failed, nothing was published; 4 a base or an adapter cannot be used; 5 an artifact"
    " is damaged; 130 stopped by Ctrl-C, 143 by SIGTERM: no artifact is changed in part."
)

app = typer.Typer(
    help="One YAML spec and one command: multi-LoRA graphs for stock onnxruntime.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

SpecPath = Annotated[Path, typer.Argument(help="The YAML spec.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def _show_version(value: bool) -> None:
    if value:
        out_console.print(loraexport.__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command. `main` reads --debug, as it needs it when typer has failed."""


@app.command()
def build(
    spec: SpecPath,
    out: Annotated[Path, typer.Option(help="Folder that holds the artifacts.")] = Path("artifacts"),
    as_json: AsJson = False,
) -> None:
    """Export, prove and publish the artifact of a spec."""
    from ..pipeline.files import text_note
    from .show_plan import describe_missing

    with show_progress(f"building {spec}", as_json) as progress:
        done = loraexport.build(spec, out, progress)
    folder, report = done.folder, done.report
    for name in report.silent_adapters:
        err_console.print(f"warning: adapter {name!r} changes nothing: all its B are zero")
    summary, digest = report.summary(), digest_file(folder / MANIFEST_FILE)
    manifest = Manifest.read(folder)
    missing = manifest.base.missing
    if as_json:
        values = {"artifact": str(folder), "digest": digest, "missing": list(missing)}
        print_json(values | {"parity": report_dict(report)})
        return
    out_console.print(
        Text("published", style="green"),
        f"{folder}: parity {summary.status}, largest error"
        f" {summary.max_error or 0:.1e} (tolerance {summary.tolerance:.0e}) over"
        f" {', '.join(summary.checked)}",
    )
    out_console.print(f"digest, to pin it: {digest}")
    for note in filter(None, (describe_missing(missing), text_note(manifest))):
        err_console.print(Text(f"note: {note}"))
    if summary.status == "deferred":
        err_console.print(
            "The ONNX graphs are unverified: run 'loraexport verify' on a CUDA machine."
        )


@app.command()
def plan(spec: SpecPath, as_json: AsJson = False) -> None:
    """Show sites, ranks, strategy and costs, without reading weights."""
    from .show_plan import plan_dict, print_plan

    planned = loraexport.make_plan(spec)
    if as_json:
        print_json(plan_dict(planned))
    else:
        print_plan(planned, out_console)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.", show_default=False)],
    providers: Annotated[
        str | None, typer.Option(help="cpu, cuda, or both with a comma; default: what runs here.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base's directory; default: where the spec says.")
    ] = None,
    torchscript: Annotated[
        bool, typer.Option("--torchscript", help="Run its TorchScript too: code that it brings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Repeat an artifact's parity, perhaps on another machine."""
    chosen = [name.strip() for name in providers.split(",")] if providers else None
    with show_progress(f"verifying {artifact}", as_json) as progress:
        done = loraexport.verify(
            artifact, base=base, providers=chosen, torchscript=torchscript, progress=progress
        )
    report = done.report
    if done.published:
        err_console.print(f"verified; digest, to pin it: {digest_file(artifact / MANIFEST_FILE)}")
    if as_json:
        print_json(report_dict(report))
    else:
        print_report(report)
    if report.failures:
        raise ParityError(f"{len(report.failures)} of {len(report.rows)} comparisons failed")


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.", show_default=False)],
    prompt: Annotated[list[str], typer.Option(help="A prompt; give it for each row.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter for each prompt in order, or 'base'; default: base."),
    ] = None,
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="0: the likeliest token always; default: as the model's own config says."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate from one batch of prompts, each with its own adapter, for a look."""
    from loraexport_runtime import load_generator

    names = [None if name == "base" else name for name in adapter or ["base"] * len(prompt)]
    with load_generator(artifact, [provider]) as generator:
        generations = generator.generate(
            prompt, adapters=names, max_new_tokens=max_new_tokens, temperature=temperature
        )
    if as_json:
        rows = zip(prompt, names, generations, strict=True)
        print_json(
            [
                {"prompt": text, "adapter": name, **asdict(generation)}
                for text, name, generation in rows
            ]
        )
        return
    for text, name, generation in zip(prompt, names, generations, strict=True):
        out_console.print(Text(f"[{name or 'base'}] {text}", style="bold"))
        out_console.print(Text(generation.text))


@app.command()
def bench(
    workloads: Annotated[
        Path | None, typer.Argument(help="The YAML of workloads.", show_default=False)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for bench.json, bench.md and the plots.")
    ] = Path("bench"),
    results: Annotated[
        Path | None,
        typer.Option("--from", help="Only tables and plots, of a bench.json.", show_default=False),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Also fit the costs by which strategy: auto chooses on this GPU.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time mixed batches against the base alone and other ways to run them."""
    from ..bench.calibrate import as_spec
    from ..bench.calibrate import calibrate as fit_costs
    from ..bench.results import read_results
    from ..bench.run import run as run_bench
    from ..bench.run import write_report
    from ..bench.workloads.schema import read_workloads

    if (workloads is None) == (results is None):
        raise UsageError("give either a file of workloads, as specs/bench/cpu.yaml, or --from")
    if results is not None:
        measured = read_results(results)
    else:
        assert workloads is not None, "one of the two is given"
        requested = read_workloads(workloads)
        with show_progress(f"measuring {workloads}", as_json) as progress:
            measured = run_bench(requested, out, progress)
    missing = write_report(measured, out)
    if missing is not None and results is not None:
        raise missing
    if missing is not None:
        err_console.print(Text(f"warning: no plots: {missing}"))
    if as_json:
        print_json(measured.model_dump(mode="json"))
    else:
        out_console.print(Text((out / "bench.md").read_text(encoding="utf-8").rstrip()))
    if calibrate:
        err_console.print(f"For the spec of a build:\n{as_spec(fit_costs(measured, out))}".rstrip())
    if measured.disagreements:
        raise ParityError("\n".join(measured.disagreements))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact, a PEFT adapter directory, or a spec.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Compare an adapter with this model: directory, hub id or package: path."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in an artifact, an adapter directory or a spec."""
    _require_access(path)
    is_artifact, note = os.path.isfile(path / MANIFEST_FILE), None  # False for a path too long
    if not is_artifact and os.path.isfile(path / CONFIG_FILE):
        _inspect_adapter(path, base, as_json)
        return
    if base is not None:
        raise UsageError(
            f"{path}: --base is what an adapter is compared with, and this is no adapter (a folder"
            f" with {CONFIG_FILE}); give one, or leave --base out"
        )
    if is_artifact:
        from ..pipeline.files import generation_defaults, text_note

        manifest = Manifest.read(path)
        manifest.check_files(path)
        data = {"digest": digest_file(path / MANIFEST_FILE), **json.loads(manifest.to_json())}
        defaults = generation_defaults(path, manifest)
        if defaults is not None:
            data["generation"] = defaults
        note = text_note(manifest)
    elif os.path.isfile(path):
        from ..spec.reader import read_spec

        data = read_spec(path).model_dump(mode="json")
    elif os.path.exists(path):
        if inner := describe_inner(path):
            raise UsageError(inner)
        raise UsageError(
            f"{path}: neither an artifact (it has no {MANIFEST_FILE}) nor an adapter (it has no"
            f" {CONFIG_FILE}); give the folder of one, or a spec"
        )
    else:
        raise UsageError(f"{path}: no such file or folder; give an artifact, an adapter or a spec")
    if as_json:
        print_json(data)
    else:
        print_tree(data)
        if note:
            err_console.print(f"note: {note}")


@app.command()
def init(
    base: Annotated[str, typer.Option(help="The model's directory, hub id or package: path.")],
    adapter: Annotated[
        list[str],
        typer.Option(help="A PEFT directory, or NAME=directory; give it for each."),
    ],
    out: Annotated[Path, typer.Option(help="The spec to write.")] = Path("spec.yaml"),
) -> None:
    """Write a commented spec for a model and its adapters."""
    from ..plan.starter import write_spec

    spec = write_spec(base, adapter, out)
    typer.echo(f"{out}: {len(spec.adapters)} adapters. Next: loraexport build {out}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec, for editors."""
    from ..spec.reader import json_schema

    print_json(json_schema())


def main() -> None:
    """Entry point: run a command; an error becomes one readable block and its exit code."""
    debug = "--debug" in sys.argv
    try:
        with stoppable():
            app()
    except Stopped as stop:
        print_error("Stopped", f"by {stop.signal.name}")
        sys.exit(128 + stop.signal)
    except LoraexportError as error:
        if debug:
            traceback.print_exc()
        else:
            print_error(type(error).__name__, str(error))
        sys.exit(exit_code(error))
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            hint = "'loraexport --debug …' shows where"
            print_error(type(error).__name__, f"{error or 'no message'} ({hint})")
        sys.exit(1)


def _require_access(path: Path) -> None:
    """Raise UsageError where this user may not see what is there: something may be."""
    try:
        os.stat(path / CONFIG_FILE)
    except PermissionError as error:
        raise UsageError(f"{path}: {reason(error)}") from error
    except (OSError, ValueError):  # what reads it says why
        return


def _inspect_adapter(path: Path, base: str | None, as_json: bool) -> None:
    from ..hf.moves import measure_deltas, measure_moves
    from ..hf.sources import resolve_directory
    from .show_adapter import deltas_dict, describe_zeros, moves_dict, print_moves

    header = read_adapter(path)
    if base is None:
        deltas = measure_deltas(header)
        (print_json if as_json else print_tree)(deltas_dict(header, deltas))
    else:
        moves = measure_moves(header, resolve_directory(base, Path(), BaseModelError))
        deltas = tuple(move.delta for move in moves)
        if as_json:
            print_json(moves_dict(header, base, moves))
        else:
            print_moves(header, base, moves, out_console)
    zeros = describe_zeros(deltas)
    if zeros:
        err_console.print(f"warning: {zeros}")
