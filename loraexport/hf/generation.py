"""How a directory's decoder is talked to: its chat templates, and generation_config.json."""

from pathlib import Path

from loraexport_runtime.contract.foreign import has_file, read_object, require_file
from loraexport_runtime.generation.text.defaults import GENERATION_CONFIG, GenerationDefaults
from loraexport_runtime.generation.text.files import MAX_TEMPLATE, MORE_TEMPLATES, TEMPLATE

from ..errors import BaseModelError
from .folder import require_copyable, require_plain_files


def find_templates(directory: Path) -> list[Path]:
    """The chat templates that are files of their own, held to what an artifact may carry.

    Raises:
        BaseModelError: one is no regular file, lies outside, or is larger than a template is.
    """
    require_plain_files(directory)
    files = [directory / TEMPLATE] if has_file(directory / TEMPLATE) else []
    more = directory / MORE_TEMPLATES
    if more.is_dir():
        require_plain_files(more)
        files += sorted(more.glob("*.jinja"))
    for file in files:
        require_file(file, BaseModelError)
        require_copyable(file)
        if file.stat().st_size > MAX_TEMPLATE:
            raise BaseModelError(
                f"{file}: more than {MAX_TEMPLATE >> 20} MiB, which no chat template has; download"
                " it again"
            )
    return files


def find_generation_config(directory: Path) -> Path | None:
    """generation_config.json, if there is one, all of whose keys the runtime computes.

    Raises:
        BaseModelError: it is damaged, or a key of it would change the tokens and is not computed.
    """
    file = directory / GENERATION_CONFIG
    if not has_file(file):
        return None
    values = read_object(file, BaseModelError)
    require_copyable(file)
    GenerationDefaults.parse(values, [], file, BaseModelError)
    return file
