"""A Ray of its own with the application on it; a program, told by lines: `kill` a replica, or end.

ray_driver.py PORT SETTINGS.json FOLDER    -> `ready`, and `killed NAME` for each `kill`
"""

import json
import sys
from pathlib import Path

import ray
from ray import serve

from loraexport_serve.ray import app


def main(port: str, settings: str, folder: str) -> None:
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
        serve.run(application, name="tests", route_prefix="/")
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "kill":
                named = ray.util.list_named_actors(all_namespaces=True)
                (first, *_) = sorted(one["name"] for one in named if "#Replica#" in one["name"])
                ray.kill(ray.get_actor(first, namespace="serve"))
                print(f"killed {first}", flush=True)
        serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
