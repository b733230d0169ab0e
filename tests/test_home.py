"""The home of builds: one for equal inputs, another for others, and none that a test changed."""

from pathlib import Path

import pytest
from support.adapters import write_adapter
from support.builds import write_small
from support.home import Home, digest_inputs

from loraexport_runtime.contract.manifest import Manifest


def test_equal_inputs_are_built_once(small: Path, home: Home, tmp_path: Path) -> None:
    spec = write_small(tmp_path / "another place")
    assert home.build(spec) == small
    assert Manifest.read(small).parity.status == "passed"
    assert not (tmp_path / "another place/artifacts").exists()


def test_other_inputs_have_another_key(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    keys = {digest_inputs(spec)}
    keys.add(digest_inputs(write_small(tmp_path, parity={"seed": 9})))
    write_adapter(tmp_path / "sql", {"blocks.0.up": (32, 48)}, rank=2, seed=9)
    keys.add(digest_inputs(spec))
    (tmp_path / "base/config.json").write_text("{}")
    keys.add(digest_inputs(spec))
    assert len(keys) == 4


def test_what_is_made_once_is_kept_and_a_failure_is_not(tmp_path: Path) -> None:
    home, calls = Home(tmp_path), []

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        home.once("models/bert", fail)
    for _ in range(2):
        assert home.once("models/bert", calls.append) == tmp_path / "models/bert"
    assert calls == [tmp_path / "models/bert"]


def test_a_changed_artifact_is_found(tmp_path: Path) -> None:
    home = Home(tmp_path)
    artifact = home.artifact(write_small)
    home.check()
    (artifact / "parity/parity.md").write_text("better")
    with pytest.raises(AssertionError, match=r"a test changed .*tiny, which others read"):
        home.check()
