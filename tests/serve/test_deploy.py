"""The image's file and Kubernetes' manifests, by their own checkers and by ours."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.documents import ROOT

from loraexport_serve.app import make_admin_app, make_app
from loraexport_serve.auth import Keys
from loraexport_serve.config.reader import read_settings
from loraexport_serve.service import Service

DEPLOY = ROOT / "examples/serve/deploy"
MANIFESTS = DEPLOY / "kubernetes.yaml"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """The manifests by kind; of the services the one of clients."""
    read = [
        one
        for one in yaml.safe_load_all(MANIFESTS.read_text())
        if "admin" not in str(one["metadata"])
    ]
    return {one["kind"]: one for one in read}


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "Dockerfile"],
        ["kubernetes-validate", "--strict", "-k", "1.34.0", "kubernetes.yaml"],
    ],
)
def test_their_own_checkers(command: list[str]) -> None:
    program, *arguments = command
    done = subprocess.run(
        [str(BIN / program), *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_pod(objects: dict[str, Any], tmp_path: Path) -> None:
    """Its settings are ours, its probes are routes, and its end is later than the server's."""
    file = tmp_path / "settings.yaml"
    file.write_text(objects["ConfigMap"]["data"]["settings.yaml"])
    settings = read_settings(file, {}, {})
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port, "admin": settings.admin_port}
    service = Service(settings, Keys())
    paths = {route.path for route in make_app(service).routes}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == "http"
        assert container[probe]["httpGet"]["path"] in paths
    assert "/metrics" in {route.path for route in make_admin_app(service).routes}
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + settings.shutdown_timeout + 5
    ready = container["readinessProbe"]
    assert before > ready["periodSeconds"] * ready["failureThreshold"]


def test_every_file_of_a_pod_is_mounted(objects: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(objects["ConfigMap"]["data"]["settings.yaml"])
    settings = read_settings(file, {}, {})
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    mounts = pod["containers"][0]["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
    places = [mount["mountPath"] for mount in mounts]
    model = settings.models["minilm"]
    assert not isinstance(model, str)
    for path in (settings.keys_file, settings.admin_token_file, model.path, model.adapter_folder):
        assert any(Path(str(path)).is_relative_to(place) for place in places), path
    assert pod["containers"][0]["args"] == ["--config", "/etc/loraexport/settings.yaml"]
    assert "/etc/loraexport/settings.yaml" in places


def test_what_a_server_on_the_cpu_installs() -> None:
    """Everything that the server and the runtime's extra need, behind the runtime's own file."""
    serve, runtime = ROOT / "runtime/serve", ROOT / "runtime"
    project = tomllib.loads((serve / "pyproject.toml").read_text())["project"]
    extras = tomllib.loads((runtime / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *extras["optional-dependencies"]["generation"]}
    needed = {line.partition(";")[0].strip() for line in needed if "loraexport" not in line}
    lines = (serve / "requirements-cpu.txt").read_text().splitlines()
    asked = {line for line in lines if line and not line.startswith("#")}
    assert asked == {"-r ../requirements-cpu.txt"} | (needed - {"numpy>=2.0"})
