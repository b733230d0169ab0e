"""The errors of the exporter, beside those of the runtime, and the exit code of each.

LoraexportError                     runtime's root; exit code 1 if nothing below fits
├── SpecError           2           the spec breaks its contract; lists every problem at once
├── UsageError          2           a command's arguments do not fit together
│   └── BuildBusyError  2           another build of the same artifact is running
├── ProviderError       2           (runtime) a provider was asked for that cannot run here
├── BatchError          2           (runtime) a batch cannot be served as asked
├── ParityError         3           a graph disagrees with the reference; nothing was published
├── BaseModelError      4           the base cannot be used
├── WeightsError        4           (runtime) a weight file is damaged, unsafe or not finite
├── AdapterError        4           (runtime) an adapter cannot be used, with its two kinds
├── ArtifactError       5           (runtime) an artifact is damaged
├── DiskFullError       1           there is no room for what is written
└── ExportError         1           torch or onnx failed on a graph: a fault of our own

Two ends of a command are no errors: 130 after SIGINT (Ctrl-C), 143 after SIGTERM.
"""

from loraexport_runtime import errors as runtime
from loraexport_runtime.contract import strict_yaml
from loraexport_runtime.errors import LoraexportError


class SpecError(strict_yaml.ProblemsError):
    """The spec breaks its contract. `problems` lists everything found, in the file's order."""


class UsageError(LoraexportError):
    """A command's arguments do not fit together."""


class BuildBusyError(UsageError):
    """Another build of the same artifact is running."""


class DiskFullError(LoraexportError):
    """There is no room for what is written; nothing was published, nothing is there in part."""


class ParityError(LoraexportError):
    """A graph disagrees with the reference; the report is kept, nothing was published."""


class BaseModelError(LoraexportError):
    """The base cannot be used: a tensor is absent, misshapen, or the path leads nowhere."""


class ExportError(LoraexportError):
    """torch or onnx failed on a graph that loraexport built."""


_EXIT_CODES: tuple[tuple[type[LoraexportError], int], ...] = (
    (SpecError, 2),
    (UsageError, 2),
    (ParityError, 3),
    (BaseModelError, 4),
    *runtime.EXIT_CODES,
)


def exit_code(error: LoraexportError) -> int:
    """The process exit code that stands for an error."""
    return runtime.exit_code(error, _EXIT_CODES)
