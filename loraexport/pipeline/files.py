"""What an artifact carries beside its graphs: the spec, adapters, the tokenizer."""

import shutil
from pathlib import Path

from loraexport_runtime.adapters.config import CONFIG_FILE, WEIGHTS_FILE

from ..plan.plan import AdapterPlan
from ..spec.schema import Spec

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
)


def copy_tokenizer(directory: Path, folder: Path) -> None:
    """Whatever the base has of its tokenizer or image processor, for a service's use."""
    for pattern in _TOKENIZER_FILES:
        for file in sorted(directory.glob(pattern)):
            folder.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.name)


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
