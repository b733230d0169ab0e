"""A Ray of its own with the application on it; a program, told by lines what to do.

ray_driver.py PORT SETTINGS.json FOLDER    -> `ready`; then each line, once it is done: `kill none`,
`kill one` or `kill all`, which wait until all replicas run.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray import serve

from loraexport_serve.ray import app

NAME = "tests"
NUM_REPLICAS = 2
MOST = 120.0
"""Seconds until a replica has another in its place."""


LIFE = 900.0
"""Seconds after which it ends, come what may: who started it may have been killed."""


def main(port: str, settings: str, folder: str) -> None:
    watch = threading.Timer(LIFE, os._exit, [1])
    watch.daemon = True
    watch.start()
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
    main(*sys.argv[1:])
