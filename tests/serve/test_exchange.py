"""An artifact is exchanged for another version, and back, while clients ask."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving import ADMIN, Server, bearer, error, serving
from support.waiting import wait_until


@pytest.fixture(scope="module")
def server(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("versions")
    for version in ("one", "two"):
        shutil.copytree(encoder, root / version)
    (root / "damaged").mkdir()
    flags = ["--artifact-roots", str(root), "--adapter-roots", str(encoder.parents[1])]
    flags += ["--admin-port", "0"]
    with serving(f"tiny={root / 'one'}", *flags, LORAEXPORT_ADMIN_TOKEN=ADMIN) as running:
        yield running


def test_there_and_back_under_load(server: Server, encoder: Path) -> None:
    """Nobody is refused, what was loaded meanwhile comes along, and the former one is closed."""
    source = {"uri": (encoder.parents[1] / "legal").as_uri()}
    assert server.admin("POST", "/v1/loras", lora_name="legal", source=source).is_success
    outcomes, is_over = Counter[int](), threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            answer = server.post("/v1/embeddings", model="legal", input=["hello world"] * 4)
            outcomes[answer.status_code] += 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number, path in enumerate(("two", "one"), 1):
            told = server.admin("POST", "/v1/artifacts", name="tiny", path=path)
            assert told.status_code == 200, told.text
            assert told.json()["adapters"] == 3
            wait_until(lambda number=number: server.log.count("closed ") >= number)  # type: ignore[misc]
            assert server.log.count("closed ") == number
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert outcomes[200] > 0
    assert set(outcomes) == {200}
    (listed,) = server.admin("GET", "/v1/artifacts").json()["artifacts"]
    assert (listed["name"], listed["artifact"], listed["kind"]) == ("tiny", "tiny", "model")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"path": "nowhere"}, 404),
        ({"path": "/etc"}, 404),
        ({"path": "damaged"}, 400),
        ({"path": "two", "digest": "0" * 64}, 400),
        ({"path": "two", "digest": "x"}, 400),
        ({"path": "two", "name": "nobody"}, 404),
    ],
)
def test_what_is_refused_changes_nothing(
    server: Server, encoder: Path, body: dict[str, str], status: int
) -> None:
    refused = server.admin("POST", "/v1/artifacts", **({"name": "tiny"} | body))
    assert error(refused)[0] == status
    assert str(encoder.parents[2]) not in refused.text
    assert server.post("/v1/embeddings", model="sql", input="a").is_success
    by_client = server.client.get(f"{server.urls[1]}/v1/artifacts", headers=bearer("x"))
    assert error(by_client)[0] == 401
