"""A manifest that is written and read again, and what it says of an artifact."""

from pathlib import Path

import pytest
from support.manifests import write_manifest

from loraexport_runtime.contract.files import MANIFEST_FILE, digest_file
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.contract.seal import DIGEST_FILE


class TestRoundTrip:
    def test_read_gives_what_was_written(self, tenants: Path, tmp_path: Path) -> None:
        manifest = Manifest.read(tenants)
        write_manifest(tmp_path, manifest.to_json())
        again = Manifest.read(tmp_path)
        assert again == manifest
        assert again.to_json() == (tenants / MANIFEST_FILE).read_text(encoding="utf-8")

    def test_it_lists_every_file_and_no_other(self, tenants: Path) -> None:
        found = {
            path.relative_to(tenants).as_posix(): (digest_file(path), path.stat().st_size)
            for path in tenants.rglob("*")
            if path.is_file() and path.name not in (MANIFEST_FILE, DIGEST_FILE)
        }
        files = Manifest.read(tenants).files
        assert {name: (one.sha256, one.size) for name, one in files.items()} == found

    def test_what_it_says_of_adapters_and_slots(self, tenants: Path) -> None:
        manifest = Manifest.read(tenants)
        assert {one.name: one.slot for one in manifest.adapters} == {
            "sql": 1,
            "chat": 2,
            "spare": None,
        }
        chat = manifest.adapters[1]
        assert chat.sites["blocks.0.k"].scaling == pytest.approx(0.5 * 8 / 8**0.5)
        assert manifest.parity.status == "passed"
