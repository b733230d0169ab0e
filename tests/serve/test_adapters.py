"""Adapters come, change and go while the artifact serves; nothing else can be loaded."""

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.serving import ADMIN, ALL, Server, error, serving, write_legal
from support.waiting import wait_until

from loraexport_serve.hosts.watch import Watch


@pytest.fixture(scope="module")
def place(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of adapters, and what is no adapter."""
    root = tmp_path_factory.mktemp("place")
    legal = encoder.parents[1] / "legal"
    (root / "watched").mkdir()
    allowed = root / "allowed"
    for name in ("legal", "other", "large", "broken", "pickled", "nan", "kin"):
        shutil.copytree(legal, allowed / name)
    write_legal(allowed / "other", seed=9)
    write_legal(allowed / "large", seed=3, rank=200)
    write_legal(allowed / "nan", seed=3, nan=True)
    write_legal(allowed / "kin", seed=3, site="encoder.layer.0.elsewhere")
    (allowed / "broken/adapter_model.safetensors").write_bytes(b"\x08" * 40)
    (allowed / "pickled/adapter_model.safetensors").unlink()
    (allowed / "pickled/adapter_model.bin").write_bytes(b"\x80")
    shutil.copytree(legal, root / "outside")
    (allowed / "link-out").symlink_to(root / "outside")
    (allowed / "link-in").symlink_to(allowed / "legal")
    (allowed / "circle").symlink_to(allowed / "circle")
    return root


@pytest.fixture(scope="module")
def server(encoder: Path, place: Path) -> Iterator[Server]:
    """One without keys that may be changed, and watches a folder."""
    settings = {
        "models": {"tiny": {"path": str(encoder), "adapter_folder": str(place / "watched")}},
        "adapter_roots": [str(place / "allowed")],
        "allow_adapter_updates": True,
        "adapter_refresh": 0.2,
        "max_adapter_rank": 16,
        "max_adapters": 8,
        "admin_socket": str(place / "admin.sock"),
    }
    file = place / "settings.yaml"
    file.write_text(json.dumps(settings))
    with serving("--config", str(file), LORAEXPORT_ADMIN_TOKEN=ADMIN) as running:
        yield running


def load(server: Server, name: str, path: str = "legal", **more: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **more}
    return server.post("/v1/load_lora_adapter", key=ADMIN, **body)


def unload(server: Server, name: str) -> httpx.Response:
    return server.post("/v1/unload_lora_adapter", key=ADMIN, lora_name=name)


def embed(server: Server, model: str) -> np.ndarray:
    answer = server.post("/v1/embeddings", model=model, input="hello world")
    assert answer.is_success, answer.text
    return np.array(answer.json()["data"][0]["embedding"])


def test_a_life_in_vllms_words(server: Server) -> None:
    done = load(server, "new")
    assert (done.status_code, done.text) == (
        200,
        "Success: LoRA adapter 'new' added successfully.",
    )
    first = embed(server, "new")
    assert np.abs(first - embed(server, "tiny")).max() > 1e-5
    again = load(server, "new")
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert "'load_inplace' to True" in again.json()["error"]["message"]
    assert load(server, "new", "other", load_inplace=True).status_code == 200
    assert np.abs(embed(server, "new") - first).max() > 1e-5
    gone = unload(server, "new")
    assert gone.text == "Success: LoRA adapter 'new' removed successfully."
    refused = unload(server, "new")
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "NotFoundError")
    assert error(server.post("/v1/embeddings", model="new", input="a"))[0] == 404


def test_a_blend_needs_a_graph_with_weights(server: Server) -> None:
    refused = server.post("/v1/embeddings", input="a", adapters={"sql": 0.5, "chat": 0.5})
    assert error(refused)[0] == 400
    assert "blend: true" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "a" * 129, "a\n", "ä", "a:b"]
)
def test_what_is_no_name(server: Server, name: str) -> None:
    assert error(load(server, name))[0] == 400


@pytest.mark.parametrize(
    "path",
    ["nobody", "..", ".", "../outside", "link-out", "circle", "/etc", "\0", "legal/..", "a" * 5000],
)
def test_what_lies_elsewhere_is_not_there(server: Server, place: Path, path: str) -> None:
    """Whether it is there cannot be told, and no answer names a place on the disk."""
    refused = load(server, "new", path)
    assert refused.status_code == 404
    assert str(place) not in refused.text
    message = refused.json()["error"]["message"]
    assert message == "There is no adapter at lora_path, below the folders that are allowed."
    absolute = load(server, "new", str(place / "outside"))
    assert absolute.json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("large", "rank is 200, and 16"),
        ("broken", "adapter 'new'"),
        ("pickled", "adapter_model.safetensors"),
        ("nan", "NaN"),
        ("kin", "elsewhere"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_400(
    server: Server, place: Path, path: str, words: str
) -> None:
    refused = load(server, "new", path)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]
    assert str(place) not in refused.text
    assert embed(server, "sql").shape == (32,)


def test_a_link_inside_is_fine(server: Server) -> None:
    assert load(server, "linked", "link-in").is_success
    assert unload(server, "linked").is_success


def test_fields_are_strict(server: Server) -> None:
    assert error(server.post("/v1/load_lora_adapter", key=ADMIN, lora_name="a"))[0] == 400
    assert error(server.post("/v1/load_lora_adapter", key=ADMIN, lora_path="legal"))[0] == 400
    assert error(server.post("/v1/unload_lora_adapter", key=ADMIN))[0] == 400
    weights = server.post("/v1/load_lora_adapter", key=ADMIN, lora_name="a", tensors={"q": [1.0]})
    assert error(weights)[0] == 400
    assert "tensors is not supported" in weights.json()["error"]["message"]
    assert error(load(server, "new", model="nobody"))[0] == 404


def test_there_is_an_end_of_adapters(server: Server) -> None:
    names = [f"one{index}" for index in range(8)]
    codes = [load(server, name).status_code for name in names]
    assert codes == [200] * 6 + [400] * 2
    for name in names[:6]:
        assert unload(server, name).is_success


def test_operators_at_a_socket(server: Server, place: Path) -> None:
    """As Dynamo's, and with what else there is to know."""
    transport = httpx.HTTPTransport(uds=str(place / "admin.sock"))
    headers = {"authorization": f"Bearer {ADMIN}"}
    url = "http://operators/v1/loras"
    with httpx.Client(transport=transport, headers=headers) as operator:
        body = {"lora_name": "ops", "source": {"uri": (place / "allowed/legal").as_uri()}}
        done = operator.post(url, json=body | {"pinned": True}).json()
        assert (done["status"], done["lora_name"]) == ("success", "ops")
        listed = operator.get(url).json()
        assert listed["count"] == len(listed["loras"])
        (row,) = (one for one in listed["loras"] if one["name"] == "ops")
        assert row["lora_id"] == done["lora_id"]
        assert (row["tier"], row["pinned"], row["rank"], row["leases"]) == ("slot", True, 4, 0)
        assert len(row["digest"]) == 64
        again = operator.post(url, json=body | {"pinned": False}).json()
        assert again == done
        (same,) = (one for one in operator.get(url).json()["loras"] if one["name"] == "ops")
        assert same == row | {"pinned": False}  # nothing was read again
        for uri in ("s3://a/b", "file://host/a", "legal", "file:", "file:///etc"):
            refused = operator.post(url, json=body | {"source": {"uri": uri}})
            assert refused.status_code in (400, 404)
        assert operator.delete(f"{url}/tiny:ops").json()["status"] == "success"
        assert operator.delete(f"{url}/ops").status_code == 404
        assert operator.get(url, headers={"authorization": "Bearer x"}).status_code == 401
        assert (place / "admin.sock").stat().st_mode & 0o077 == 0


def test_a_folder_is_watched(server: Server, place: Path) -> None:
    """What comes serves at its first request, what changes is replaced, what goes is 404."""
    watched = place / "watched"
    shutil.copytree(place / "allowed/legal", watched / "tenant")
    first = embed(server, "tenant")
    write_legal(watched / "tenant", seed=21)
    wait_until(lambda: np.abs(embed(server, "tenant") - first).max() > 1e-5)
    second = embed(server, "tenant")
    (watched / "tenant/adapter_model.safetensors").write_bytes(b"half a save")
    wait_until(lambda: "'tenant' is not loaded" in server.log)
    np.testing.assert_array_equal(embed(server, "tenant"), second)  # what served still does
    shutil.rmtree(watched / "tenant")
    wait_until(lambda: server.post("/v1/embeddings", model="tenant", input="a").status_code == 404)
    for name in (".hidden", "a b"):
        shutil.copytree(place / "allowed/legal", watched / name)
        assert error(server.post("/v1/embeddings", model=name, input="a"))[0] == 404
    (watched / "out").symlink_to(place / "outside")
    assert error(server.post("/v1/embeddings", model="out", input="a"))[0] == 404


class _Updates:
    """What a watched folder asks for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def find_folder(self, name: str, watched: str) -> Path:
        return Path(watched) / name

    async def load(self, _: object, name: str, __: Path, *, in_place: bool) -> None:
        assert in_place
        self.asked.append(("load", name))

    async def unload(self, _: object, name: str) -> None:
        self.asked.append(("unload", name))


@pytest.mark.parametrize("at", ["tenants", "tenants/acme"])
def test_a_folder_that_is_away_takes_nobody_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A share that cannot be read for a while says nothing of its adapters; what serves stays."""
    folder, updates = tmp_path / "tenants", _Updates()
    write_legal(folder / "acme", seed=1)
    host: Any = SimpleNamespace(name="tiny", has=lambda name: ("load", name) in updates.asked)
    watch = Watch(host, str(folder), cast("Any", updates))
    asyncio.run(watch.look())

    def fail(self: Path, *_: object, **__: object) -> os.stat_result:
        if tmp_path / at in (self, self.parent):
            raise OSError(errno.ESTALE, "Stale file handle")
        return os.stat(self)

    with monkeypatch.context() as away:
        away.setattr(Path, "iterdir" if at == "tenants" else "stat", fail)
        asyncio.run(watch.look())
    assert updates.asked == [("load", "acme")]
    shutil.rmtree(folder / "acme")
    asyncio.run(watch.look())
    assert updates.asked == [("load", "acme"), ("unload", "acme")]


def test_without_consent_there_is_no_such_route(encoder: Path) -> None:
    with serving(f"tiny={encoder}") as closed:
        assert error(load(closed, "new"))[0] == 404
        assert error(closed.get("/v1/loras"))[0] == 404


def test_of_several_artifacts_one_is_named(many: Server) -> None:
    source = {"uri": "file:///nowhere"}
    assert many.admin("POST", "/v1/loras", lora_name="x", source=source).status_code == 400
    body = {"lora_name": "legal", "lora_path": "legal", "model": "tiny"}
    assert many.post("/v1/load_lora_adapter", key=ADMIN, **body).is_success
    assert many.post("/v1/embeddings", key=ALL, model="legal", input="a").is_success
    assert many.post("/v1/unload_lora_adapter", key=ADMIN, lora_name="legal").is_success
    several = many.post("/v1/unload_lora_adapter", key=ADMIN, lora_name="sql")
    assert error(several)[0] == 400
    assert many.admin("DELETE", "/v1/loras/sql").status_code == 400


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_adapter_that_overflows_is_its_callers_fault(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Finite values whose products are not: 400, however often, and readiness stays."""
    artifact: Path = request.getfixturevalue(kind)
    name = "legal" if kind == "encoder" else "first"
    shutil.copytree(artifact.parents[1] / name, tmp_path / "huge")
    tensors = load_file(tmp_path / "huge/adapter_model.safetensors")
    huge = {key: value * np.float32(1e25) for key, value in tensors.items()}
    save_file(huge, tmp_path / "huge/adapter_model.safetensors")
    settings = ["--allow-adapter-updates", "--adapter-roots", str(tmp_path)]
    variables = {"LORAEXPORT_ADMIN_TOKEN": ADMIN}
    with serving(f"tiny={artifact}", *settings, "--admin-port", "0", **variables) as running:
        assert load(running, "huge", "huge").is_success
        path, body = "/v1/embeddings", {"input": "a"}
        if kind == "decoder":
            path, body = "/v1/completions", {"prompt": "a", "max_tokens": 4}
        for _ in range(6):
            assert error(running.post(path, model="huge", **body)) == (400, "no_number")
        assert running.get("/readyz").status_code == 200
        assert running.post(path, model="tiny", **body).is_success
