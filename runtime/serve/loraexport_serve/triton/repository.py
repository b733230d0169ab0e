"""An artifact -> a Triton model repository: config.pbtxt, model.py, in process the artifact too."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from loraexport_runtime.contract.kinds import Decoder, Graph, Model
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import ArtifactError, InputError

from ..hosts.encoder import TOKENIZER
from ..hosts.labels import names_of
from ..hosts.vectors import vector_outputs

_MODEL = Path(__file__).parent / "model.py"
_SHAPES = "config.pbtxt"


@dataclass(frozen=True)
class Interface:
    """What a model takes and gives in Triton."""

    kind: str
    """What `model.py` asks the server for: embed, score, classify, generate."""
    inputs: tuple[str, ...]
    """Strings."""
    output: str
    width: int | None
    """Numbers of the output for each row; None: a string."""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How Triton batches and queues, and whom the model asks."""

    name: str
    socket: str | None = None
    """The server's; None: the artifact is opened in Triton's process."""
    key_file: str | None = None
    device: str = "cpu"
    rows: int = 32
    """Of a batch."""
    most_queued: int = 10_000
    timeout: float = 60.0
    """Seconds in Triton's queue."""


def write_repository(artifact: Path, out: Path, options: Options) -> Path:
    """Write `out/NAME`, all of it or nothing. Returns it.

    Raises:
        ArtifactError: there is no artifact, it is damaged, or it has nothing that Triton could be
            given.
        InputError: the model's folder exists.
    """
    manifest = Manifest.read(artifact)
    interface = interface_of(artifact, manifest)
    folder = out / options.name
    if folder.exists():
        raise InputError(f"{folder} exists; remove it, or give --name or another --out")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=out) as staging:
        new = Path(staging) / options.name
        version = new / "1"
        version.mkdir(parents=True)
        (new / _SHAPES).write_text(config_of(interface, options), encoding="utf-8")
        if interface.labels:
            text = "".join(f"{label}\n" for label in interface.labels)
            (new / "labels.txt").write_text(text, encoding="utf-8")
        shutil.copyfile(_MODEL, version / "model.py")
        if options.socket is None:
            shutil.copytree(artifact.resolve(), version / "artifact")
            Manifest.read(version / "artifact").check_files(version / "artifact")
        new.rename(folder)
    return folder


def interface_of(artifact: Path, manifest: Manifest) -> Interface:
    """What Triton is told of an artifact. Raises ArtifactError: it has no such interface."""
    match manifest.kind:
        case Decoder():
            return Interface("generate", ("PROMPT", "ADAPTER"), "TEXT", None)
        case Model() as model:
            pass
        case Graph(model=model):
            pass
        case _:
            raise ArtifactError(f"{artifact}: single layers, which have no route of texts")
    if f"{TOKENIZER}/tokenizer.json" not in manifest.files:
        raise ArtifactError(f"{artifact}: it has no tokenizer, so it takes no texts")
    if model.task == "sequence-classification":
        width = int(model.outputs[0].shape[-1])
        if width == 1:
            return Interface("score", ("TEXT", "TEXT_PAIR", "ADAPTER"), "SCORE", 1)
        labels = tuple(names_of(model, width))
        return Interface("classify", ("TEXT", "ADAPTER"), "PROBABILITIES", width, labels)
    vectors = vector_outputs(model)
    if model.task == "token-classification" or len(vectors) != 1:
        raise ArtifactError(
            f"{artifact}: of task {model.task}, whose outputs are as long as each text; Triton is"
            " given one vector, score or set of labels for a text. Serve it with loraexport-serve"
        )
    return Interface("embed", ("TEXT", "ADAPTER"), "EMBEDDING", int(vectors[0].shape[1]))


def config_of(interface: Interface, options: Options) -> str:
    """config.pbtxt.

    ADAPTER is required, "" for the base: Triton batches no two requests of which one has an input
    that the other lacks.
    """
    is_stream = interface.kind == "generate"
    dims = "1" if interface.width is None else str(interface.width)
    kind = "TYPE_STRING" if interface.width is None else "TYPE_FP32"
    labels = ', label_filename: "labels.txt"' if interface.labels else ""
    inputs = ",\n".join(
        f'  {{ name: "{name}", data_type: TYPE_STRING, dims: [ 1 ] }}' for name in interface.inputs
    )
    is_light = options.socket is not None and not is_stream
    on_gpu = options.socket is None and options.device == "cuda"
    count = 2 if is_light else 1  # one batch is written out while the next one is computed
    group = f"count: {count}, kind: {'KIND_GPU, gpus: [ 0 ]' if on_gpu else 'KIND_CPU'}"
    values = {
        "KIND": interface.kind,
        "MODEL": options.name,
        "SOCKET": options.socket or "",
        "KEY_FILE": options.key_file or "",
    }
    if is_stream:
        values |= {"MOST_QUEUED": str(options.most_queued), "TIMEOUT": f"{options.timeout:g}"}
    lines = [
        "# Written by `loraexport-serve triton`.",
        f"name: {_quoted(options.name)}",
        'backend: "python"',
        f"max_batch_size: {0 if is_stream else options.rows}",
        f"input [\n{inputs}\n]",
        f'output [ {{ name: "{interface.output}", data_type: {kind}, dims: [ {dims} ]{labels} }} ]',
        f"instance_group [ {{ {group} }} ]",
        *(
            f'parameters {{ key: "{key}", value: {{ string_value: {_quoted(value)} }} }}'
            for key, value in values.items()
        ),
    ]
    if is_stream:
        lines.append("model_transaction_policy { decoupled: true }")
    else:
        lines += [
            "dynamic_batching {",
            "  max_queue_delay_microseconds: 0",
            "  default_queue_policy {",
            "    timeout_action: REJECT",
            f"    default_timeout_microseconds: {round(1e6 * options.timeout)}",
            "    allow_timeout_override: true",
            f"    max_queue_size: {options.most_queued}",
            "  }",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
