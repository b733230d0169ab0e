"""The targets: how an input starts, and what is done with it when something is wrong in it."""

import random
import shutil
from pathlib import Path

import numpy as np
from support.builds import write_model_project, write_small, write_tenants, write_vit_project
from support.decoders import FAMILIES, write_decoder
from support.manifests import write_manifest

import loraexport
import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.contract.foreign import has_file

from .mutate import mutate
from .target import ChangedNumbersError, Target

SEGMENTS = ((None, 2), ("sql", 1), ("chat", 3))
"""Of every batch that is compared: the base and two tenants."""


class Specs(Target):
    """A spec.yaml, to its plan."""

    def prepare(self) -> None:
        for write in (write_small, write_tenants, write_model_project):
            write(self.home / write.__name__)
        self.originals = sorted(path for path in self.home.iterdir() if path.is_dir())

    def attack(self, draw: random.Random) -> str:
        folder = self.fresh(draw.choice(self.originals))
        alone = folder / "mutated"
        alone.mkdir()
        shutil.move(folder / "spec.yaml", alone / "spec.yaml")
        said = mutate(alone, draw)
        if (alone / "spec.yaml").exists() or (alone / "spec.yaml").is_symlink():
            shutil.move(alone / "spec.yaml", folder / "spec.yaml")
        self.said = said
        loraexport.make_plan(folder / "spec.yaml")
        return said


class Bases(Target):
    """A base's own files, to the plan."""

    def prepare(self) -> None:
        projects = self.home / "originals"
        write_model_project(projects / "bert")
        write_vit_project(projects / "vit")
        write_decoder(projects / "llama", FAMILIES["Llama"])
        write_small(projects / "layers")
        self.originals = sorted(projects.iterdir())

    def attack(self, draw: random.Random) -> str:
        folder = self.fresh(draw.choice(self.originals))
        adapters = {path.parent for path in folder.rglob("adapter_config.json")}
        base = next(
            path for path in sorted(folder.iterdir()) if path.is_dir() and path not in adapters
        )
        self.said = mutate(base, draw)
        self.use(folder)
        return self.said

    def use(self, folder: Path) -> None:
        """Do what a user does with the base in a folder."""
        loraexport.make_plan(folder / "spec.yaml")


class Builds(Bases):
    """A base's own files, to its artifact: what is sound there takes seconds."""

    warm_ups = 1

    def use(self, folder: Path) -> None:
        build(folder / "spec.yaml", folder / "out")


class Adapters(Target):
    """A PEFT folder, loaded into a session beside two others, whose rows must not move."""

    def prepare(self) -> None:
        spec = write_tenants(self.home / "project", slots=3)
        artifact, _ = build(spec, self.home / "out")
        self.session = lr.load_layers(artifact, threads=1)
        generator = np.random.default_rng(1)
        self.x = generator.standard_normal((6, 32)).astype(np.float32)
        self.before = self._run()

    def attack(self, draw: random.Random) -> str:
        folder = self.fresh(self.home / "project" / draw.choice(("sql", "chat", "spare")))
        self.said = mutate(folder, draw)
        try:
            self.session.load_adapter("guest", folder)
            guest = self.session["up"].run(self.x, segments=[("guest", 6)])
            if not np.isfinite(guest).all():
                raise ChangedNumbersError("a loaded adapter gives NaN or Inf")
            self.session.unload_adapter("guest")
        finally:
            if self._run() != self.before:
                raise ChangedNumbersError("rows of other tenants have moved")
        return self.said

    def _run(self) -> bytes:
        names = ("qkv", "up")
        return b"".join(
            self.session[name].run(self.x, segments=list(SEGMENTS)).tobytes() for name in names
        )


class Artifacts(Target):
    """An artifact's files, opened and run; every third manifest has a digest that fits it."""

    def prepare(self) -> None:
        self.artifact, _ = build(write_tenants(self.home / "project"), self.home / "out")
        generator = np.random.default_rng(1)
        self.x = generator.standard_normal((6, 32)).astype(np.float32)
        self.before = self._run(self.artifact)

    def attack(self, draw: random.Random) -> str:
        folder = self.fresh(self.artifact)
        if draw.random() < 0.33:
            alone = folder.parent / "manifest"
            alone.mkdir()
            shutil.copy(folder / MANIFEST_FILE, alone)
            self.said = f"sealed, {mutate(alone, draw)}"
            file = alone / MANIFEST_FILE
            if file.is_file() and not file.is_symlink() and file.stat().st_size < 2**24:
                write_manifest(folder, file.read_bytes())
            else:
                (folder / MANIFEST_FILE).unlink()
                if has_file(file):
                    shutil.move(file, folder)
        else:
            self.said = mutate(folder, draw)
        # A manifest with a digest that fits may name fewer layers, and never gives others.
        if not self._run(folder).items() <= self.before.items():
            raise ChangedNumbersError("an artifact that opens gives other numbers")
        return self.said

    def _run(self, folder: Path) -> dict[str, bytes]:
        with lr.load_layers(folder, threads=1) as session:
            return {
                name: session[name].run(self.x, segments=list(SEGMENTS)).tobytes()
                for name in ("qkv", "up")
                if name in session
            }
