"""What an artifact carries beside its graphs: the spec, adapters, the tokenizer."""

import shutil
from pathlib import Path

from loraexport_runtime.adapters.config import CONFIG_FILE, WEIGHTS_FILE
from loraexport_runtime.contract.kinds import Graph, Model
from loraexport_runtime.contract.manifest import Manifest

from ..plan.plan import AdapterPlan
from ..spec.schema import Spec
from .progress import Progress

_TOKENIZER = "tokenizer/tokenizer.json"


def copy_tokenizer(directory: Path, folder: Path, model: Model, progress: Progress) -> None:
    """Copy what the base has of its tokenizer or image processor, for a service's use.

    Of a model of texts without tokenizer.json it is made of the vocabulary; if it cannot be, the
    progress says why.

    Args:
        folder: the artifact.

    Raises:
        BaseModelError: a file of them is damaged.
    """
    from ..hf.tokenizer import find_files, write_tokenizer

    target = folder / Path(_TOKENIZER).parent
    for file in find_files(directory):
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
    if _takes_text(model) and not (folder / _TOKENIZER).is_file():
        progress("write tokenizer.json")
        why = write_tokenizer(directory, folder / _TOKENIZER)
        if why:
            progress(f"no tokenizer.json: {why}")


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


def _takes_text(model: Model) -> bool:
    return any(entry.name == "input_ids" for entry in model.inputs)


def portable(spec: Spec) -> Spec:
    """The spec as the artifact carries it: its adapters are the artifact's own copies."""
    copies = [
        adapter.model_copy(update={"path": f"adapters/{adapter.name}"}) for adapter in spec.adapters
    ]
    return spec.model_copy(update={"adapters": tuple(copies)})


def copy_adapter(adapter: AdapterPlan, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter.header.path / name, folder / name)
