"""A Ray of its own with the application on it; a program, told by lines what to do.

ray_driver.py serve PORT SETTINGS.json FOLDER    -> `ready`; then each line, once it is done: `kill
none`, `kill one` or `kill all`, which wait until all replicas run.
ray_driver.py check APPLICATION.yaml    -> its import path; then, for each line of settings beside
the file's, `taken`, or as JSON why not.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray._private import services
from ray.serve._private import api, client
from ray.serve.schema import ServeDeploySchema

from loraexport_serve import SettingsError
from loraexport_serve.ray import app

NAME = "tests"
NUM_REPLICAS = 2
MOST = 240.0
"""Seconds until Ray runs, and until a replica has another in its place."""
LIFE = 1800.0
"""Seconds after which it ends, come what may: who started it may have been killed."""


def run(port: str, settings: str, folder: str) -> None:
    """Serve until there are no more lines."""
    _be_patient()
    ray.init(
        num_cpus=8,  # as Ray counts them: an ingress, and two replicas that may be replaced
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        _temp_dir=folder,
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
        application = app({"settings": json.loads(Path(settings).read_text())})
        serve.run(application, name=NAME, route_prefix="/")
        print("ready", flush=True)
        for line in sys.stdin:
            replicas = _wait_for_replicas()
            most = {"kill none": 0, "kill one": 1, "kill all": NUM_REPLICAS}[line.strip()]
            for name in replicas[:most]:
                ray.kill(ray.get_actor(name, namespace="serve"))
            print(line, end="", flush=True)
        serve.shutdown()
    finally:
        ray.shutdown()


def check(file: str) -> None:
    """Hold a file of applications to Ray's schema, and its settings, with more, to ours."""
    read = yaml.safe_load(Path(file).read_text())
    (application,) = ServeDeploySchema.model_validate(read).applications
    print(application.import_path)
    for line in sys.stdin:
        try:
            app({"settings": application.args["settings"] | json.loads(line)})
            print("taken")
        except SettingsError as error:
            print(json.dumps(str(error)))


def _be_patient() -> None:
    """Let Ray wait so long for what it gives up after half a minute, or one, by itself.

    Its proxies, and its node, whose agents are processes of Python: no variable sets these.
    """
    api.HTTP_PROXY_TIMEOUT = client.HTTP_PROXY_TIMEOUT = MOST
    get_node = services.get_node

    def get_node_at_last(gcs_address: str, node_id: str) -> Any:
        end = time.monotonic() + MOST
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    services.get_node = get_node_at_last


def _wait_for_replicas() -> list[str]:
    """Their names, once all of them run: whoever kills one then leaves another."""
    end = time.monotonic() + MOST
    while True:
        named = ray.util.list_named_actors(all_namespaces=True)
        names = sorted(one["name"] for one in named if "#Replica#" in one["name"])
        states = serve.status().applications[NAME].deployments["Replica"].replica_states
        if len(names) == states.get("RUNNING", 0) == NUM_REPLICAS:
            return names
        if time.monotonic() > end:
            raise TimeoutError(f"{names} {states}")
        time.sleep(0.1)


if __name__ == "__main__":
    watch = threading.Timer(LIFE, os._exit, [1])
    watch.daemon = True
    watch.start()
    {"serve": run, "check": check}[sys.argv[1]](*sys.argv[2:])
