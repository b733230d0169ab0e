"""A format that fails, at its export or at its first run: the error names it, and the other."""

from pathlib import Path
from typing import Any

import pytest
from support.builds import write_model_project

from loraexport.errors import ExportError, exit_code
from loraexport.parity.model import check
from loraexport.pipeline import model
from loraexport.pipeline.build import build


@pytest.mark.parametrize(("broken", "works"), [("torchscript", "onnx"), ("onnx", "torchscript")])
def test_an_export_that_fails_does_not_hide_that_the_other_works(
    broken: str, works: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ExportError(f"{broken}: no such operator")

    monkeypatch.setattr(model, f"export_model_{broken}", fail)
    monkeypatch.setattr(model, f"export_model_{works}", lambda *_: None)
    spec = write_model_project(tmp_path, export={"formats": ["torchscript", "onnx"]})
    message = rf"^{broken}: no such operator\. As {works} it can be made: set export: {{formats: "
    with pytest.raises(ExportError, match=message) as caught:
        build(spec, tmp_path / "out")
    assert exit_code(caught.value) == 1
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]


def test_a_graph_that_does_not_run_names_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_broken(*_: Any) -> Any:
        def run(*_: Any) -> None:
            raise RuntimeError("Non-zero status code\nmore of it")

        return run

    monkeypatch.setattr(check, "_torchscript_runner", open_broken)
    spec = write_model_project(tmp_path, export={"formats": ["torchscript", "onnx"]})
    message = (
        r"^torchscript-cpu does not run: Non-zero status code\. As onnx it can be made: set export:"
        r" {formats: \[onnx\]}$"
    )
    with pytest.raises(ExportError, match=message):
        build(spec, tmp_path / "out")
