"""`GET /`: what it may load, that it names nobody, and what a person sees in a real browser."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import PROGRAM, Browser, browsing
from support.serving import ADMIN, Server, serving

HOSTILE = '<img src=x onerror="window.hit=1">'
_METRICS = """const asked = window.fetch;
window.fetch = (path, ...rest) =>
  path === "metrics" ? Promise.resolve(new Response(%s)) : asked(path, ...rest);
"""
CLIENT = "a-key-of-a-client"
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="apt-get install chromium")


@pytest.fixture(scope="module")
def guarded(encoder: Path) -> Iterator[Server]:
    """One with a key, and a port for operators."""
    variables = {"LORAEXPORT_API_KEYS": CLIENT, "LORAEXPORT_ADMIN_TOKEN": ADMIN}
    with serving(f"tiny={encoder}", "--admin-port", "0", **variables) as running:
        yield running


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    """Its policy allows its own script and style by digest, and questions to its own server."""
    answer = server.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    own = {name: _digests(name, answer.text) for name in ("script", "style")}
    assert policy == {
        "default-src": "'none'",
        "script-src": own["script"],
        "style-src": own["style"],
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?:|\bsrc=|\bhref=|\bstyle=|\bon\w+=", answer.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", answer.text)


def _digests(name: str, page: str) -> str:
    (text,) = re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)
    assert page.count(f"<{name}") == 1
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def test_the_page_itself_names_nobody(guarded: Server) -> None:
    """It is the same for anybody, at both ports; names come with the token, by /metrics."""
    bare, with_key = guarded.get("/"), guarded.get("/", key=CLIENT)
    assert bare.status_code == 200
    assert bare.text == with_key.text == guarded.admin("GET", "/").text
    for name in ("tiny", "sql", "chat"):
        assert not re.search(rf"\b{name}\b", bare.text)
    assert (
        guarded.get("/metrics").status_code
        == guarded.get("/metrics", key=CLIENT).status_code
        == 401
    )


def test_every_metric_of_the_page_is_there(server: Server) -> None:
    server.post("/v1/embeddings", model="sql", input="a")
    named = set(re.findall(r'"((?:vllm:|loraexport_)\w+)"', server.get("/").text))
    families = set(re.findall(r"^# TYPE (\S+)", server.get("/metrics").text, re.MULTILINE))
    assert len(named) > 10
    assert named <= families


def test_the_page_is_described(server: Server) -> None:
    operation = server.get("/openapi.json").json()["paths"]["/"]["get"]
    assert list(operation["responses"]["200"]["content"]) == ["text/html"]
    assert operation["security"] == []


_ANSWERS = """() => Number([...document.querySelectorAll("#answers tr")]
    .map((row) => [...row.cells].map((cell) => cell.textContent))
    .find(([route, status]) => route === "/v1/embeddings" && status === "200")?.[2] ?? 0)"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path) as running:
        yield running
        assert not running.said


def _rows(browser: Browser, table: str) -> list[list[str]]:
    cells = "[...row.cells].map((cell) => cell.textContent)"
    rows: list[list[str]] = browser.evaluate(
        f"[...document.querySelectorAll('#{table} tr')].map((row) => {cells})"
    )
    return rows


def _give(browser: Browser, token: str) -> None:
    field = f"document.getElementById('token').value = {json.dumps(token)}"
    browser.evaluate(f"{field}; document.querySelector('button').click()")


@pytest.mark.slow
@needs_chromium
def test_a_person_sees_a_server_live(guarded: Server, browser: Browser) -> None:
    """A token is asked for, a wrong one refused, and what is asked meanwhile is counted."""
    browser.open(f"{guarded.urls[1]}/")
    browser.wait("document.getElementById('form')?.hidden === false")
    _give(browser, CLIENT)
    browser.wait("document.getElementById('error').textContent.includes('not known')")
    _give(browser, ADMIN)
    browser.wait("!document.getElementById('main').hidden")
    assert browser.evaluate("document.getElementById('form').hidden")
    assert browser.evaluate("document.getElementById('phase').textContent") == "ready"
    assert [row[0] for row in _rows(browser, "models")[1:]] == ["tiny"]
    assert {row[1] for row in _rows(browser, "adapters")[1:]} == {"sql", "chat"}
    before = browser.evaluate(f"({_ANSWERS})()")
    guarded.post("/v1/embeddings", key=CLIENT, model="tiny", input="hello")
    browser.wait(f"({_ANSWERS})() === {before + 1}")
    latencies = _rows(browser, "latencies")[1:]
    named = [["tiny", "a whole answer"], ["tiny", "in the queue"]]
    assert [latency[:2] for latency in latencies] == named
    assert all(0 <= float(value) <= 120 for latency in latencies for value in latency[2:])


@pytest.mark.slow
@needs_chromium
def test_no_name_becomes_html(server: Server, browser: Browser) -> None:
    """No adapter can have such a name; the page would show it as it is all the same."""
    quoted = HOSTILE.replace('"', r"\"")
    labels = f'model="tiny",adapter="{quoted}",tier="slot",pinned="false"'
    text = f'loraexport_slots{{model="tiny"}} 3\nloraexport_adapter_loaded{{{labels}}} 1\n'
    browser.open(f"{server.url}/", before=_METRICS % json.dumps(text))
    browser.wait("document.getElementById('adapters')?.rows.length > 1")
    assert _rows(browser, "adapters")[1][1] == HOSTILE
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("window.hit") is None
