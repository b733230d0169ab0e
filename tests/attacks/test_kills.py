"""Builds that are killed: afterwards the old artifact or the new one is there, whole."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.builds import write_small
from support.processes import check_whole, left_over, read_until, start_build

from loraexport.artifact import staging
from loraexport.pipeline.build import build
from loraexport.spec.reader import read_spec
from loraexport_runtime import load
from loraexport_runtime.contract.manifest import Manifest

PUBLISH_AND_DIE = """
import os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path
from loraexport import artifact
from loraexport_runtime.contract.manifest import Manifest

out, moment = Path(sys.argv[1]), sys.argv[2]

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    return lambda *arguments, **options: (function(*arguments, **options), die())

if moment == "before the manifest":
    Path.write_text = die
elif moment == "half a manifest":
    write = Path.write_text
    Path.write_text = lambda path, text, **options: (write(path, text[:99], **options), die())
elif moment == "before the switch":
    artifact._exchange = die
elif moment == "after the switch":
    artifact._exchange = after(artifact._exchange)
elif moment == "while the old one is removed":
    os.unlink = after(os.unlink)

manifest = Manifest.read(out / "tiny")
with artifact.staging(out, "tiny") as stage:
    (stage.folder / "graphs").mkdir()
    (stage.folder / "graphs/new").write_bytes(b"new")
    if moment == "before publish":
        die()
    stage.publish(replace(manifest, name="new", layers=(), adapters=()))
"""


class TestKilled:
    """SIGKILL: afterwards the old artifact or the new one is there, whole."""

    @pytest.mark.parametrize(
        ("moment", "found"),
        [
            ("before publish", "tiny"),
            ("before the manifest", "tiny"),
            ("half a manifest", "tiny"),
            ("before the switch", "tiny"),
            ("after the switch", "new"),
            ("while the old one is removed", "new"),
        ],
    )
    def test_at_every_step_of_publishing(
        self, small: Path, tmp_path: Path, moment: str, found: str
    ) -> None:
        shutil.copytree(small, tmp_path / "tiny")
        command = [sys.executable, "-c", PUBLISH_AND_DIE, str(tmp_path), moment]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert check_whole(tmp_path / "tiny").name == found
        assert len(left_over(tmp_path)) == 1
        with staging(tmp_path, "tiny") as stage:
            assert left_over(tmp_path) == [stage.folder.name]

    @pytest.mark.parametrize(
        ("stage", "delay"),
        [
            pytest.param("read weights", 0.0, marks=pytest.mark.slow),
            pytest.param("export up to ONNX", 0.0, marks=pytest.mark.slow),
            pytest.param("export up to ONNX", 0.7, marks=pytest.mark.slow),
            pytest.param("verify", 0.0, marks=pytest.mark.slow),
            pytest.param("verify", 0.05, marks=pytest.mark.slow),
            ("publish", 0.0),
        ],
    )
    def test_a_real_build(self, small: Path, tmp_path: Path, stage: str, delay: float) -> None:
        """The delay only varies the moment: what must hold holds at every one."""
        out = tmp_path / "out"
        shutil.copytree(small, out / "tiny")
        spec = write_small(tmp_path, parity={"seed": 7})
        digests = (Manifest.read(small).spec_digest, read_spec(spec).digest())
        process = start_build(spec, out)
        read_until(process, stage)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), "killed, or faster than the kill"
        assert check_whole(out / "tiny").spec_digest in digests
        assert load(out / "tiny", threads=1).adapters == {"sql": 1}
        new = build(write_small(tmp_path, parity={"seed": 8}), out)[0]
        assert check_whole(new).spec_digest not in digests
        assert sorted(path.name for path in out.iterdir()) == [".tiny.lock", "tiny"]
