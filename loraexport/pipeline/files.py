"""What an artifact carries beside its graphs: the spec, adapters, the tokenizer."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from loraexport_runtime.adapters.dora import SCALES_FILE
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.contract.kinds import Decoder, Graph, Model
from loraexport_runtime.contract.listed import ListedFiles
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.text.defaults import GenerationDefaults

from ..bases.adapters import OutputScales
from ..plan.plan import AdapterPlan
from ..spec.schema import Spec
from .progress import Progress

_TOKENIZER = "tokenizer/tokenizer.json"


def copy_tokenizer(
    directory: Path, folder: Path, model: Model, progress: Progress, lower_case: bool = False
) -> None:
    """Copy what the base has of its tokenizer or image processor, for a service's use.

    Of a model of texts without tokenizer.json it is made of the vocabulary; if it cannot be, the
    progress says why.

    Args:
        folder: the artifact.
        lower_case: capitals are the same as small letters, whatever the base's own tokenizer does.

    Raises:
        BaseModelError: a file of them is damaged.
    """
    from ..hf.tokenizer import drop_code, find_files, fold_case, write_tokenizer

    target = folder / Path(_TOKENIZER).parent
    for file in find_files(directory):
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
    drop_code(target)
    if _takes_text(model) and not (folder / _TOKENIZER).is_file():
        progress("write tokenizer.json")
        why = write_tokenizer(directory, folder / _TOKENIZER)
        if why:
            progress(f"no tokenizer.json: {why}")
    if lower_case and (folder / _TOKENIZER).is_file():
        fold_case(folder / _TOKENIZER)


def text_note(manifest: Manifest) -> str | None:
    """What a published artifact of texts lacks to take them; None if it lacks nothing."""
    match manifest.kind:
        case (Model() as model) | Graph(model) if _takes_text(model):
            has_tokenizer = _TOKENIZER in manifest.files
        case _:
            return None  # a decoder has its tokenizer, or is not built
    if has_tokenizer:
        return None
    return (
        f"it has no {_TOKENIZER}: it takes token ids and cannot take text. For text, save a fast"
        " tokenizer into the base's directory (AutoTokenizer.from_pretrained(…).save_pretrained)"
        " and build again"
    )


def generation_defaults(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """How a decoder generates where a call says nothing else; None of another kind.

    Raises:
        ArtifactError: a file that says so is damaged.
    """
    match manifest.kind:
        case Decoder(folder=inner):
            config = read_genai_config(folder / inner)
            files = ListedFiles(folder, manifest.files)
            return asdict(GenerationDefaults.read(files, inner, config))
        case _:
            return None


def _takes_text(model: Model) -> bool:
    return any(entry.name == "input_ids" for entry in model.inputs)


def portable(spec: Spec) -> Spec:
    """The spec as the artifact carries it: its adapters are the artifact's own copies."""
    copies = [
        adapter.model_copy(update={"path": f"adapters/{adapter.name}"}) for adapter in spec.adapters
    ]
    return spec.model_copy(update={"adapters": tuple(copies)})


def write_scales(folder: Path, output_scales: OutputScales) -> None:
    """What of adapters with DoRA a session needs that has no base: beside their files.

    Args:
        folder: the artifact.
    """
    for name, scales in output_scales.items():
        if scales:
            (folder / "adapters" / name / SCALES_FILE).write_bytes(save(dict(scales)))


def copy_adapter(adapter: AdapterPlan, folder: Path) -> None:
    """Copy an adapter's files, as they were planned. Raises AdapterError: they have changed."""
    folder.mkdir(parents=True)
    adapter.header.files.copy_to(folder)
